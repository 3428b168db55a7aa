"""`distill report`: the results of the finished stages, brought together and handed to the page.

Flow: run -> `gather` (plain data) -> report.html, students.html, report.json. Unit of data: one run.
"""

from __future__ import annotations

import json
from typing import Any

from distill.cli.run import Run
from distill.progress import console

Result = dict[str, Any]


def report(run: Run) -> Result:
    """The report of what is there: HTML with plots and JSON beside it. Always made anew."""
    from student_trainer.report import write_report

    gathered = gather(run)
    if gathered["stages"][run.edge.name] is None and run.edge.folder.exists():
        console.print(
            f"[bold]report[/bold]: the edge files in {run.edge.folder} are of other settings or an older distill and are left out;"
            " `distill export-student` makes them anew"
        )
    path = write_report(run.folder / "report", gathered)
    console.print(f"[bold]report[/bold]: {path}")
    return {"html": str(path), "json": str(path.with_suffix(".json"))}


def gather(run: Run) -> dict[str, Any]:
    """Everything that the report shows: settings, and the results of the stages that are finished."""
    from student_trainer.history import read_history

    stages = [*run.teachers, run.train, run.evaluate, run.edge]
    if run.file.train.control:
        stages.append(run.control)
    run.evaluate.require()
    pretrained = None if run.file.import_ else run.pretrain.result()
    rejected = run.folder / "rejected.jsonl"
    lines = rejected.read_text(encoding="utf-8").splitlines() if rejected.exists() else []
    return {
        "run": json.loads(run.file.model_dump_json(by_alias=True)),
        "class_names": list(run.class_names),
        "stages": {stage.name: stage.result() for stage in stages},
        "teacher": run.teacher.name,
        "pretrain_curve": pretrained["curve"] if pretrained else [],
        "history": {stage.name: read_history(stage.folder / "metrics.jsonl") for stage in stages if stage in (run.train, run.control)},
        "rejected": [json.loads(line) for line in lines],
    }
