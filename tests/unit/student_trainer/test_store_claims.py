"""Claims on units of labelling: one owner at a time, a dead one's are taken over, a living one's are not."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from distill.errors import StoreError
from student_trainer import store_claims
from student_trainer.store_claims import Claims
from student_trainer.store_files import StoreFiles, open_files

LONG_S = 600.0


@pytest.fixture(params=["folder", "memory"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> StoreFiles:
    return open_files(tmp_path if request.param == "folder" else f"memory://{uuid.uuid4().hex}")


def until(happens: Callable[[], bool], limit_s: float = 60) -> None:
    end = time.monotonic() + limit_s
    while not happens():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)


def test_a_unit_has_one_owner_until_it_is_given_back(files: StoreFiles) -> None:
    with Claims(files, LONG_S) as one, Claims(files, LONG_S) as other:
        assert one.take(0, 1)
        assert not other.take(0, 1)
        assert not one.take(0, 1)
        assert not other.is_free(0, 1)
        assert other.take(0, 2)
        assert other.take(1, 1)
        one.release(0, 1)
        assert other.is_free(0, 1)
        assert other.take(0, 1)
    assert files.names("claims") == {}


def test_of_many_that_want_it_at_once_one_gets_it(files: StoreFiles) -> None:
    claimants = [Claims(files, LONG_S) for _ in range(8)]
    start = threading.Barrier(len(claimants))
    got: list[bool] = []

    def work(claims: Claims) -> None:
        start.wait(30)
        got.append(claims.take(3, 4))

    threads = [threading.Thread(target=work, args=(claims,)) for claims in claimants]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == [False] * 7 + [True]


def test_a_claim_that_beats_is_kept_however_long_it_takes(files: StoreFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """The watcher's clock goes on only when the owner has beaten: no machine is too slow for this test."""
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(store_claims, "time", clock)
    with Claims(files, lease_s=0.6) as owner, Claims(files, lease_s=0.6) as watcher:
        assert owner.take(0, 0)
        (name,) = files.names("claims")
        for _ in range(10):  # five virtual seconds: eight leases
            assert not watcher.is_free(0, 0)
            said = files.read(name)
            until(lambda said=said: files.read(name) != said)
            clock.now += 0.5
        assert not watcher.is_free(0, 0)


def test_a_claim_that_says_nothing_more_is_taken_over_by_one(files: StoreFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an owner on another machine, so that only its silence tells."""
    monkeypatch.setattr(store_claims, "_machine", lambda: "elsewhere")
    silent = Claims(files, LONG_S)
    assert silent.take(0, 0)
    monkeypatch.undo()
    with Claims(files, lease_s=0.3) as one, Claims(files, lease_s=0.3) as other:
        assert not one.take(0, 0)
        until(lambda: one.take(0, 0))
        assert not other.take(0, 0)
        one.release(0, 0)
        assert files.names("claims") == {}
        silent.close()  # it wakes up and gives back what is no longer its own
        assert other.take(0, 0)


def test_the_claim_of_a_killed_process_of_this_machine_is_over_at_once(tmp_path: Path) -> None:
    program = (
        "import sys, time\n"
        "from student_trainer.store_claims import Claims\n"
        "from student_trainer.store_files import open_files\n"
        "assert Claims(open_files(sys.argv[1]), 600.0).take(0, 0)\n"
        "print('taken', flush=True)\n"
        "time.sleep(600)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "taken\n"
        with Claims(open_files(tmp_path), LONG_S) as claims:
            assert not claims.take(0, 0)
            child.kill()
            child.wait()
            assert claims.take(0, 0)
    finally:
        child.kill()
        child.wait()
        assert child.stdout is not None
        child.stdout.close()


def test_an_owner_that_wakes_up_leaves_the_claim_of_a_later_one_alone(files: StoreFiles, caplog: pytest.LogCaptureFixture) -> None:
    """It was frozen; a second owner took over, gave back, and a third has a claim of the same name."""
    asleep, also_asleep = Claims(files, 0.3), Claims(files, LONG_S)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Claims, "_start_beating", lambda self: None)
        patch.setattr(store_claims, "_is_alive", lambda process: False)
        for frozen in (asleep, also_asleep):
            assert frozen.take(0, 0)
        with Claims(files, LONG_S) as second:
            assert second.take(0, 0)
    assert files.names("claims") == {}
    with Claims(files, LONG_S) as third, Claims(files, LONG_S) as fourth:
        assert third.take(0, 0)
        (name,) = files.names("claims")
        said = files.read(name)
        asleep._start_beating()
        until(lambda: f"{name} was taken over" in caplog.text)
        asleep.close()
        also_asleep.close()
        assert {n: files.read(n) for n in files.names("claims")} == {name: said}
        assert not fourth.take(0, 0)
    assert files.names("claims") == {}


def test_what_one_found_over_another_may_take_over_unless_the_owner_woke_up(files: StoreFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(store_claims, "_is_alive", lambda process: False)
        dead, woken, watcher = Claims(files, LONG_S), Claims(files, LONG_S), Claims(files, LONG_S)
        assert dead.take(0, 0)
        assert woken.take(0, 1)
        assert watcher.is_free(0, 0)
        assert watcher.is_free(0, 1)
    files.replace(next(name for name in files.names("claims") if "shard-000001" in name), woken._said(1))
    monkeypatch.setattr(store_claims, "_machine", lambda: "elsewhere")
    with Claims(files, LONG_S) as untold, Claims(files, LONG_S, watcher.over) as told:
        assert not untold.take(0, 0)
        assert told.take(0, 0)
        assert not told.take(0, 1)


@pytest.mark.parametrize("fault", [OSError("no route"), PermissionError(13, "an odd answer")])
def test_files_that_fail_cost_no_labelling_job_its_work(
    files: StoreFiles, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: Exception
) -> None:
    """Giving back is said and goes on, looking is a StoreError, and the beats come again when the files do."""

    def fail(*_: object) -> None:
        raise fault

    with Claims(files, 0.3) as mine, Claims(files, 600) as others:
        assert mine.take(0, 0)
        with monkeypatch.context() as patch:
            patch.setattr(files, "replace", fail)
            until(lambda: "could not be renewed" in caplog.text)
        before = files.read(next(iter(files.names("claims"))))
        until(lambda: files.read(next(iter(files.names("claims")))) != before)
        with monkeypatch.context() as patch:
            patch.setattr(files, "names", fail)
            with pytest.raises(StoreError, match=r"the claims in .* cannot be read: (no route|an odd answer)"):
                others.is_free(0, 0)
            mine.release(0, 0)
        assert "could not be given back" in caplog.text
        assert len(files.names("claims")) == 1
