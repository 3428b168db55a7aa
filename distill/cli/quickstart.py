"""`distill quickstart`: the whole line on one run file, each step said aloud, ending with a table and a report."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
from rich.table import Table

from distill.cli import reporting, verbs
from distill.cli.run import Run
from distill.cli.verbs import served_teacher
from distill.cluster.session import ray_session
from distill.errors import DistillError
from distill.image_sets import open_labelled, open_unlabelled
from distill.progress import console, duration

_MOST_TRIED = 5  # test images for the one request that is shown


def quickstart(run: Run) -> None:
    """Images to edge students. What is there with the same settings is reused."""
    started = time.monotonic()
    file = run.file
    unlabelled = open_unlabelled(file.data)
    console.print(f"run {run.folder}: {unlabelled.num_images} unlabelled images, {len(run.class_names)} classes, {file.data.image_size} px")
    with ExitStack() as cluster:
        if not run.finished:
            cluster.enter_context(ray_session(file.ray))  # one for all stages that train
        verbs.make_teacher(run)
        if file.self_distill:
            verbs.self_distill(run)
        if not run.finished:
            _serve_and_train(run)
        else:
            for stage in (run.train, run.evaluate):
                console.print(f"[bold]{stage.name}[/bold]: done before with these settings, reused ({stage.folder})")
    verbs.export_student(run)
    made = reporting.report(run)
    console.print(result_table(reporting.gather(run)))
    console.print(f"done in {duration(time.monotonic() - started)}; report: {Path(made['html']).absolute()}")


def _serve_and_train(run: Run) -> None:
    from teacher_server.serve import Gateway

    console.print("[bold]serve[/bold]: starting the teacher")
    # For one request of ours: a free port, as several runs may share this machine, on loopback only, so that no key is needed.
    settings = run.file.server.replace(host="127.0.0.1", port=0, auth="none")
    with served_teacher(run) as served:
        with Gateway(served.connect, settings) as gateway:
            show_one_request(run, gateway.url)
        verbs.train(run, served.address)
        verbs.evaluate(run, served.address)


def show_one_request(run: Run, url: str) -> None:
    """Send the first test image that can be used to the gateway and show question and answer."""
    for record in open_labelled(run.file.data.test, run.file.data).read_shard(0)[:_MOST_TRIED]:
        kind = "jpeg" if record.data[:2] == b"\xff\xd8" else "webp" if record.data[:4] == b"RIFF" else "png"
        answer = _ask(url, record.data, kind)
        if answer is not None:
            break
        console.print(f"  the gateway cannot use {record.image_id}; the next one", markup=False)
    else:
        console.print(f"  none of the first {_MOST_TRIED} test images can be used; training counts and lists such images")
        return
    console.print(
        f"  $ curl --data-binary @{Path(record.image_id).stem}.{kind} -H 'Content-Type: image/{kind}' '{answer.request.url}'", markup=False
    )
    console.print(f"  {answer.text.strip()}", markup=False)


def _ask(url: str, image: bytes, kind: str) -> httpx.Response | None:
    """The answer with a label; None where it is the image that cannot be used."""
    query = {"temperature": "2", "top_k": "3", "names": "true"}
    try:
        answer = httpx.post(f"{url}/v1/soft-labels", params=query, content=image, headers={"Content-Type": f"image/{kind}"}, timeout=30)
        if answer.status_code in (413, 422):
            return None
        return answer.raise_for_status()
    except httpx.HTTPError as error:
        raise DistillError(f"the gateway at {url} did not answer the first request: {error}") from error


def result_table(gathered: dict[str, Any]) -> Table:
    """Teacher, students and controls in one table."""
    scores = gathered["stages"]["evaluate"]
    table = Table(title="on the test images")
    for heading in ("network", "parameters", "top-1", "ECE", "agrees with teacher", "KL to teacher"):
        table.add_column(heading, justify="left" if heading == "network" else "right")
    teachers = {"teacher": scores["teacher"]}
    if "first_teacher" in scores:
        teachers = {"first teacher": scores["first_teacher"], "teacher, self-distilled": scores["teacher"]}
    for title, entry in teachers.items():
        table.add_row(title, "", f"{entry['scores']['top1']:.1%}", f"{entry['scores']['ece']:.3f}", "", "")
    for group, title in (("students", "distilled"), ("controls", "labels only")):
        for name, entry in scores[group].items():
            near = entry["to_teacher"]
            table.add_row(
                f"{name}, {title}",
                f"{entry['num_parameters']:,}",
                f"{entry['scores']['top1']:.1%}",
                f"{entry['scores']['ece']:.3f}",
                f"{near['top1_agreement']:.1%}",
                f"{near['kl']:.3f}",
            )
    return table
