"""`distill compare`: the students of several runs on one page."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("compare")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
@click.option(
    "--to",
    type=click.Path(path_type=Path),
    default=Path("students.html"),
    show_default=True,
    help="The page. What is there is replaced only if it is such a page.",
)
def compare(runs: tuple[Path, ...], to: Path) -> None:
    """The students of several runs on one page.

    Accuracy against latency and size, who is beaten by nobody, and what each cost.

    RUN is a run's folder with a report in it (`distill report`), or a report.json.
    """
    from distill.progress import console
    from student_trainer.report import write_comparison

    reports = [run / "report" / "report.json" if run.is_dir() else run for run in runs]
    console.print(f"[bold]compare[/bold]: {write_comparison(to, reports)}")
