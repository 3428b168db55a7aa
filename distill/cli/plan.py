"""`distill plan`: how many teachers, decode threads and student workers a run needs, how long it takes, what it costs, and whether that
was true.

Flow: a run file -> rates, measured here or given -> student_trainer.capacity -> tables, and RUN_DIR/plan.json -> with --check, beside
what the finished run then did. Nothing heavy is imported here before the command runs: `distill --help` must answer at once.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from distill.cli import DEFAULT_RUN_FILE

if TYPE_CHECKING:
    from distill.cli.plan_report import CapacityPlan
    from distill.cli.run import Run
    from student_trainer.capacity import StageRates, Work
    from student_trainer.job import TrainJob

PLAN_FILE = "plan.json"

RATE = click.FloatRange(min=0, min_open=True)
COUNT = click.IntRange(min=1)


@click.command("plan", short_help="How many teachers and workers, how long, how much? Measures this machine. Needs export-teacher.")
@click.option("--config", type=click.Path(path_type=Path), default=DEFAULT_RUN_FILE, show_default=True, help="The run file (YAML).")
@click.option("--images", type=COUNT, help="Plan for so many images instead of the run's.")
@click.option("--epochs", type=COUNT, help="Instead of train.epochs.")
@click.option("--views", type=COUNT, help="Instead of train.num_views.")
@click.option("--images-per-shard", type=RATE, help="Instead of the mean of the run's image shards.")
@click.option("--workers", type=COUNT, help="Student workers. Default: ray.num_workers, or as many as --hours wants.")
@click.option("--hours", type=RATE, help="As many student workers as end the training in so many hours.")
@click.option("--teacher-rate", type=RATE, help="Images a second of one teacher instance, instead of measuring.")
@click.option("--decode-rate", type=RATE, help="Images a second of one decode thread, instead of measuring.")
@click.option("--student-rate", type=RATE, help="Images a second that one worker trains all students on, instead of measuring.")
@click.option("--label-bytes", type=RATE, help="Of a kept label, instead of measuring.")
@click.option("--image-bytes", type=RATE, help="Of an image file, instead of measuring.")
@click.option("--price-per-hour", type=RATE, help="Of one device, teacher instance or student worker.")
@click.option("--seconds", type=RATE, default=4.0, show_default=True, help="How long each station is measured, about.")
@click.option("--check", is_flag=True, help="Measure nothing: put RUN_DIR/plan.json beside what the finished run then did.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON only.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error and the log.")
@click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
def plan(config: Path, check: bool, as_json: bool, debug: bool, overrides: tuple[str, ...], **options: Any) -> None:
    """Say what a distillation needs so that nobody waits, before it is begun.

    Measures, with the run's own teacher, students and images, what one of each can do; then says how many of each, over what network, into
    how large a store, in what time and at what cost: with labels asked while training, with labels made ahead, and, for comparison, with
    the teacher inside the training loop on as many devices. Every assumption is printed. Rates that are given are not measured; with
    --teacher-rate, --decode-rate and --student-rate nothing is, and no teacher is needed. The plan is kept in RUN_DIR/plan.json, and
    after the run --check says how good it was.
    """
    logging.basicConfig(level=logging.INFO if debug else logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    from distill.cli.run_file import read_run_file

    file = read_run_file(config, list(overrides))

    from distill.cli.plan_report import compared, compared_table, print_plan, read_plan
    from distill.cli.run import Run
    from distill.progress import console

    run = Run(file)
    path = run.folder / PLAN_FILE
    console.quiet = as_json
    try:
        if check:
            rows = compared(read_plan(path), run.train.require())
            console.print(compared_table(rows))
            said: Any = [{**row.model_dump(mode="json"), "ratio": row.ratio} for row in rows]
        else:
            made = make_plan(run, options)
            path.write_text(made.model_dump_json(indent=1) + "\n", encoding="utf-8")
            print_plan(made)
            console.print(f"kept in {path}; after the run, `distill plan --check` says how true it was")
            said = made.model_dump(mode="json")
    finally:
        console.quiet = False
    if as_json:
        import json

        click.echo(json.dumps(said, indent=1))


def make_plan(run: Run, options: dict[str, Any]) -> CapacityPlan:
    """Measure what is not given, and plan.

    Args:
        options: the command's, by name.

    Raises:
        ConfigError: fewer images than a batch has.
        StageMissing: something must be measured, and the teacher is not exported.
        DistillError: what measuring raises.
    """
    from distill.cli.plan_report import CapacityPlan, assumptions
    from distill.errors import ConfigError
    from student_trainer.capacity import needs, predict, undisturbed, ways, workers_for
    from student_trainer.capacity_scale import growth, memory, traffic

    students = [student.replace(initial_weights="random") for student in run.file.train.students]
    job = run.job("distill", run.file.train.replace(students=students))
    own = own_work(run, job)
    images = options["images"] or own.images
    wanted = own.replace(
        images=images,
        global_batch=job.batch_of(images),
        epochs=options["epochs"] or own.epochs,
        views=options["views"] or own.views,
        images_per_shard=options["images_per_shard"] or own.images_per_shard,
    )
    if wanted.images < wanted.global_batch:
        raise ConfigError(f"{wanted.images} images are less than one batch (train.global_batch {wanted.global_batch}); plan for more")
    measured, rates = None, given_rates(run, options)
    prediction = undisturbed_prediction = None
    if rates is None:
        measured, cores, stored = _measured(run, options["seconds"])
        rates = replaced(measured.rates, options)
        of_run = {"workers": run.file.ray.num_workers, "stored": stored}
        prediction = predict(measured.rates, own, cores=cores, **of_run)
        free = undisturbed(measured.rates, measured.cores, run.file.ray.threads * run.file.ray.num_workers)
        undisturbed_prediction = predict(free, own, cores=float(measured.cores), **of_run)
    workers = options["workers"] or (workers_for(rates, wanted, options["hours"]) if options["hours"] else run.file.ray.num_workers)
    found = needs(rates, wanted, workers=workers)
    return CapacityPlan(
        work=wanted,
        rates=rates,
        measured=measured,
        assumptions=assumptions(run, rates, measured, options),
        needs=found,
        ways=ways(rates, wanted, found, options["price_per_hour"]),
        traffic=traffic(rates, wanted, found.images_per_s),
        memory=memory(rates, wanted, workers),
        growth=growth(rates, wanted),
        prediction=prediction,
        undisturbed=undisturbed_prediction,
    )


def own_work(run: Run, job: TrainJob) -> Work:
    """What the run itself, whose job it is, would do.

    Raises:
        SourceError: its images cannot be opened.
    """
    from distill.image_sets import open_labelled
    from student_trainer.capacity import Work

    file = run.file
    images = job.open_images()
    return Work(
        images=images.num_images,
        epochs=file.train.epochs,
        views=file.train.num_views,
        global_batch=job.loading(images).global_batch,
        num_classes=len(run.class_names),
        images_per_shard=images.num_images / len(images.shards),
        window_shards=file.data.window_shards,
        num_threads=file.data.num_threads,
        in_flight=file.train.requests_in_flight,
        views_held=job.rules.views_held,
        mixing_cache_bytes=float(job.loading(images).mixing_cache_bytes if job.recipe.mixing.mixes else 0),
        test_images=open_labelled(file.data.test, file.data).num_images,
        evaluations=min(file.train.num_evaluations, file.train.epochs) - 1,
    )


def given_rates(run: Run, options: dict[str, Any]) -> StageRates | None:
    """The rates, where all three are given; None where something must be measured."""
    if not (options["teacher_rate"] and options["decode_rate"] and options["student_rate"]):
        return None
    from student_trainer.capacity import StageRates

    num_classes, size = len(run.class_names), run.file.data.image_size
    return StageRates(
        teacher=options["teacher_rate"],
        decode=options["decode_rate"],
        students={"all students": options["student_rate"]},
        label_bytes=options["label_bytes"] or 2.0 * num_classes,
        crop_bytes=3.0 * size * size,
        answer_bytes=4.0 * num_classes,
        encoded_bytes=options["image_bytes"] or 0.0,
    )


def replaced(rates: StageRates, options: dict[str, Any]) -> StageRates:
    """The measured rates, with those in their place that were given."""
    changes: dict[str, Any] = {}
    if options["teacher_rate"]:
        changes |= {"teacher": options["teacher_rate"], "teacher_core_s": None}
    if options["decode_rate"]:
        changes |= {"decode": options["decode_rate"], "decode_scaling": 1.0, "decode_core_s": None}
    if options["student_rate"]:
        changes |= {"students": {"all students": options["student_rate"]}, "student_core_s": None}
    changes |= {"label_bytes": options["label_bytes"]} if options["label_bytes"] else {}
    changes |= {"encoded_bytes": options["image_bytes"]} if options["image_bytes"] else {}
    return rates.replace(**changes)


def _measured(run: Run, seconds: float) -> tuple[Any, float, int]:
    """(measurements, cores that a run may count on, labels that its store holds already)."""
    from distill.cli.plan_measure import measure
    from distill.cli.verbs import served_teacher
    from student_trainer.open_store import open_label_store

    with served_teacher(run) as served:
        found = measure(run, served.address, seconds)
        job = run.distill_job(served.address, run.teacher, run.file.train)
    assert job.store_folder is not None
    local = "://" not in job.store_folder
    stored = open_label_store(job).stats().num_labels if not local or Path(job.store_folder).exists() else 0
    return found, min(float(found.cores), max(1.0, found.cores_had)), stored
