"""`distill serve`: the teacher and the REST gateway, until Ctrl-C or SIGTERM."""

from __future__ import annotations

from distill.cli.run import Run
from distill.cli.verbs import served_teacher
from distill.progress import console


def serve(run: Run) -> None:
    """Start both, say where they are, stop both."""
    from teacher_server.serve import Gateway

    with served_teacher(run) as served, Gateway(served.connect, run.file.server) as gateway:
        console.print(f"  REST at {gateway.url}/v1/soft-labels, documentation at {gateway.url}/docs; Ctrl-C stops")
        gateway.serve_until_stopped()
    console.print("stopped")
