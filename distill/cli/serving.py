"""`distill serve`: the teacher and the REST gateway, until Ctrl-C or SIGTERM."""

from __future__ import annotations

from typing import Any

from distill.cli.run import Run
from distill.cli.serving_record import announced, this_service
from distill.cli.verbs import served_teacher
from distill.progress import console


def serve(run: Run) -> None:
    """Start both, say where they are, stop both."""
    from teacher_server.access import Access
    from teacher_server.serve import Gateway

    Access(run.file.server)  # a gateway without keys is refused here, not after the teacher has been started
    with (
        served_teacher(run) as served,
        Gateway(served.connect, run.file.server, _parity(run)) as gateway,
        announced(run.folder, this_service(served, run.repository, gateway.url)),
    ):
        console.print(f"  page at {gateway.url}/, REST at {gateway.url}/v1/soft-labels, documentation at {gateway.url}/docs; Ctrl-C stops")
        gateway.serve_until_stopped()
    console.print("stopped")


def _parity(run: Run) -> dict[str, dict[str, Any]]:
    """What the parity gate measured when this teacher was exported, under the fingerprint that it holds for."""
    result = run.teacher.result()
    if result is None:
        return {}
    # Without the list of the worst images: their names are nobody's business.
    return {result["fingerprint"]: {name: value for name, value in result["parity"].items() if name != "worst"}}
