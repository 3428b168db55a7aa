"""`distill gateway`: only the REST gateway, before teachers that run elsewhere.

`distill serve` without its run: no run file, no run folder, no torch. For a container that stands beside Triton and is started and stopped
apart from it. It answers `/healthz` at once and `/readyz` as soon as a label comes out of the teacher.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from teacher_server.settings import ServerSettings


@click.command("gateway", short_help="Only the REST gateway, before a Triton that runs elsewhere.")
@click.option("--model", required=True, help="Name of the teacher in Triton: teacher.name of the run that exported it.")
@click.option("--triton", metavar="HOST:PORT", help="gRPC endpoint of Triton; the same as server.triton.url=HOST:PORT.")
@click.option("--debug", is_flag=True, help="Show the log, and the traceback of an error.")
@click.argument("overrides", nargs=-1, metavar="[server.KEY=VALUE]...")
def gateway(model: str, triton: str | None, debug: bool, overrides: tuple[str, ...]) -> None:
    """The REST gateway before the teacher MODEL, which a Triton at HOST:PORT serves, or several that server.pool.urls names, until it is
    stopped. Settings are those of the section `server` of a run file.

    It waits for the teacher and says so: requests get 503 until a label comes out of it.
    """
    logging.basicConfig(level=logging.INFO if debug else logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    settings = _settings(triton, overrides)

    from distill.progress import console
    from teacher_server.serve import FirstLabel, Gateway, teacher_elsewhere

    served = teacher_elsewhere(settings, model)
    with Gateway(served.connect, settings) as running, FirstLabel(served.address, lambda line: console.print(f"  {line}", markup=False)):
        console.print(f"  page at {running.url}/, REST at {running.url}/v1/soft-labels, documentation at {running.url}/docs", markup=False)
        running.serve_until_stopped()
    console.print("stopped")


def _settings(triton: str | None, overrides: tuple[str, ...]) -> ServerSettings:
    from distill.config import validate, with_overrides
    from distill.errors import ConfigError
    from teacher_server.settings import ServerSettings

    tree: dict[str, Any] = with_overrides({}, [f"server.triton.url={triton}"] if triton else [])
    tree = with_overrides(tree, list(overrides))
    strangers = sorted(set(tree) - {"server"})
    if strangers:
        raise ConfigError(f"{strangers[0]} is no setting of the gateway: it takes those of the section `server`, such as server.port=8080")
    settings = validate(ServerSettings, tree.get("server", {}), origin="the gateway's settings")
    if not settings.triton.url and not settings.pool.urls:
        raise ConfigError("nobody says where the teacher is: give --triton HOST:PORT, or several by server.pool.urls=[HOST:PORT, ...]")
    return settings
