"""A verb as a job on a running Ray cluster: submitted there, followed from here, stopped with the follower.

Flow: a command line -> `follow_job` -> Ray's job server on the head -> the same command line, on the head -> its exit code.
Unit of data: one job. What runs is found again: a follower that died and is started anew goes on with the job of before.
"""

from __future__ import annotations

import asyncio
import logging
import shlex
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from distill.errors import ServerStartError
from distill.extras import how_to_install

COMMAND = "distill_command"
"""Key of the command line in a job's metadata."""
_PAUSE_S = 2.0
_STOPPED_AFTER_S = 600.0


@dataclass(frozen=True)
class JobEnd:
    """How a job ended."""

    job_id: str
    status: str
    """`SUCCEEDED`, `FAILED` or `STOPPED`."""
    exit_code: int
    """Of the command; 1 where Ray does not know it."""


def follow_job(cluster: str, command: Sequence[str], show: Callable[[str], None], say: Callable[[str], None], patience_s: float) -> JobEnd:
    """Run a command as a job and show its log until it ends.

    A job of the same command that waits or runs is followed, not started a second time; one that a new head knows no more is submitted
    again. Whatever interrupts this call (Ctrl-C, SIGTERM) stops the job and waits for its end: training writes a checkpoint first.

    Args:
        cluster: address of the job server, `http://HOST:8265`.
        command: program and arguments. The cluster's machines have the program, the images and the run folder.
        show: gets pieces of the job's log.
        say: gets our own lines.
        patience_s: how long the job server is waited for, at the start and in between.

    Raises:
        ServerStartError: the job server did not answer for so long, or Ray lacks its job server (the extra `cluster`).
    """
    try:
        from ray.job_submission import JobSubmissionClient
    except ImportError as error:
        raise ServerStartError(f"Ray's job client is not installed: {how_to_install('cluster')}") from error
    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)  # it tells of every connection that it closes

    text = shlex.join(command)
    client = _patiently(lambda: JobSubmissionClient(cluster), cluster, say, patience_s)
    try:
        while True:
            job_id = _patiently(lambda: _running(client, text), cluster, say, patience_s)
            if job_id is not None:
                say(f"job {job_id} runs this command already; it is followed")
            else:
                job_id = client.submit_job(entrypoint=text, metadata={COMMAND: text})
                say(f"job {job_id} on {cluster}: {text}")
            try:
                return _follow(client, job_id, cluster, show, say, patience_s)
            except _Forgotten:
                say(f"the cluster's head was started anew and knows no job {job_id}; it is submitted again and goes on from what is kept")
    except KeyboardInterrupt:
        say("stopping the job; training writes a checkpoint first")
        with suppress(ConnectionError, RuntimeError, OSError):  # where nobody answers, there is nothing to stop
            _stop(client, text)
        raise


class _Forgotten(Exception):
    """The cluster knows no such job: its head was started anew."""


def _running(client: Any, text: str) -> str | None:
    """The id of a job of this command that is not over."""
    ours = [job for job in client.list_jobs() if (job.metadata or {}).get(COMMAND) == text and not job.status.is_terminal()]
    return ours[0].submission_id if ours else None


def _follow(client: Any, job_id: str, cluster: str, show: Callable[[str], None], say: Callable[[str], None], patience_s: float) -> JobEnd:
    log = _Log(show)
    while True:
        info = _patiently(lambda: _info(client, job_id), cluster, say, patience_s)
        if info.status.is_terminal():
            log.whole(_patiently(lambda: client.get_job_logs(job_id), cluster, say, patience_s))
            code = info.driver_exit_code
            return JobEnd(job_id, info.status.value, 0 if info.status.value == "SUCCEEDED" else code or 1)
        with suppress(ConnectionError, RuntimeError, OSError):  # whether the job goes on is asked above
            asyncio.run(log.follow(client.tail_job_logs(job_id)))
        time.sleep(_PAUSE_S)


class _Log:
    """A job's log, shown once, however often its beginning comes."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show
        self._shown = 0

    async def follow(self, pieces: AsyncIterator[str]) -> None:
        """`pieces` begin with the first of the log."""
        seen = 0
        async for piece in pieces:
            seen += len(piece)
            self._show_last(piece, seen)

    def whole(self, text: str) -> None:
        """All of it."""
        self._show_last(text, len(text))

    def _show_last(self, text: str, seen: int) -> None:
        fresh = seen - self._shown
        if fresh > 0:
            self._show(text[-fresh:])
            self._shown = seen


def _info(client: Any, job_id: str) -> Any:
    try:
        return client.get_job_info(job_id)
    except RuntimeError as error:
        if "does not exist" in str(error):
            raise _Forgotten from error
        raise


def _stop(client: Any, text: str) -> None:
    """Stop the job of this command, if there is one, and wait for its end."""
    job_id = _running(client, text)
    if job_id is None:
        return
    client.stop_job(job_id)
    deadline = time.monotonic() + _STOPPED_AFTER_S
    while time.monotonic() < deadline and not client.get_job_status(job_id).is_terminal():
        time.sleep(0.5)


def _patiently(ask: Callable[[], Any], cluster: str, say: Callable[[str], None], patience_s: float) -> Any:
    """What `ask` returns, asked again while the job server does not answer."""
    from ray.exceptions import AuthenticationError

    deadline, said = time.monotonic() + patience_s, False
    while True:
        try:
            return ask()
        except AuthenticationError as error:
            raise ServerStartError(
                f"the job server at {cluster} refuses us: it wants the token of its cluster (RAY_AUTH_MODE=token, RAY_AUTH_TOKEN_PATH=FILE)"
            ) from error
        except (ConnectionError, RuntimeError, OSError) as error:
            reason = " ".join(str(error).split())[:300]
            if time.monotonic() > deadline:
                raise ServerStartError(f"the job server at {cluster} did not answer for {patience_s:g} s: {reason}") from error
            if not said:
                say(f"waiting for the job server at {cluster}: {reason}")
                said = True
            time.sleep(_PAUSE_S)
