"""`distill tune`: measures how the run's teacher is best served on this machine, and has the run serve it so.

Nothing heavy is imported here before the command runs: `distill --help` must answer at once.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from distill.cli import DEFAULT_RUN_FILE

if TYPE_CHECKING:
    from distill.teacher_info import TeacherInfo
    from export.settings import RepositorySettings, TeacherExportSettings
    from teacher_server.settings import ServerSettings
    from teacher_server.tuning import Candidate, Measured

LARGEST_QUEUE = 4096
LONGEST_P99_MS = 600_000.0
LONGEST_MINUTES = 1440.0
DELAY_SHARE = 0.05
"""Waiting for a full batch may take this share of the latency limit."""


def _number(ctx: click.Context, param: click.Parameter, value: float) -> float:
    """Refuse NaN, which is within every range."""
    if math.isnan(value):
        raise click.BadParameter("nan is no number", ctx, param)
    return value


@click.command(
    "tune", short_help="Measure batch size x instances x threads on this machine; the run serves the best. Needs export-teacher."
)
@click.option("--config", type=click.Path(path_type=Path), default=DEFAULT_RUN_FILE, show_default=True, help="The run file (YAML).")
@click.option(
    "--max-p99-ms",
    type=click.FloatRange(min=0, min_open=True, max=LONGEST_P99_MS),
    callback=_number,
    default=1000.0,
    show_default=True,
    help="Of 100 requests 99 must be answered within this time while the teacher is busy.",
)
@click.option(
    "--minutes",
    type=click.FloatRange(min=0, min_open=True, max=LONGEST_MINUTES),
    callback=_number,
    default=3.0,
    show_default=True,
    help="How long to measure, at most about.",
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error and the log.")
@click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
def tune(config: Path, max_p99_ms: float, minutes: float, debug: bool, overrides: tuple[str, ...]) -> None:
    """Find how many images Triton should put into a batch, how many copies of the teacher should run, and with how many threads.

    The real Triton runs the run's own teacher in every plausible way; the one with the most images a second within the latency limit is
    chosen. It is written into the model repository and into RUN_DIR/tuning.json, from which every later export of this teacher takes it,
    unless the run file says something else. The table it was decided from is printed, and lies in that file, too.
    """
    logging.basicConfig(level=logging.INFO if debug else logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    from distill.cli.run_file import read_run_file

    file = read_run_file(config, list(overrides))

    from distill.cli.run import Run

    run = Run(file)
    run.teacher.require()
    tune_teacher(run.repository, run.teacher_settings, file.server, max_p99_ms, minutes * 60)


def tune_teacher(
    repository: Path, teacher: TeacherExportSettings, server: ServerSettings, max_p99_ms: float, budget_s: float
) -> RepositorySettings:
    """Measure the served version, choose, write.

    Args:
        repository: the model repository, in the run folder.
        teacher: its name, and how the run file wants it to be run.
        server: where Triton is installed.
        max_p99_ms: the latency limit, in ms.
        budget_s: how long to measure, at most about.

    Raises:
        StageMissing: there is no such teacher in the repository.
        ConfigError: no way to run it keeps the limit, the time did not do for looking at every way once, or the run is being served while
            it would be measured. Nothing is written; an earlier tuning stays.
        ServerStartError: Triton cannot run here or does not start.
    """
    from distill.cli.serving_record import running_service
    from distill.cli.tuning_file import TUNED_FIELDS, Tuning, fixed_fields, write_tuning
    from distill.errors import ConfigError
    from distill.progress import console
    from export.repository_versions import active_info, run_version_so
    from teacher_server.tuning import candidates, choose, needed_s, usable_cores

    name = teacher.name
    service = running_service(repository)
    if service is not None:
        raise ConfigError(f"`distill serve` of this run (process {service.pid}) would be measured, too; stop it first")
    info = active_info(repository, name)
    table = _measure(repository, info, teacher.repository, server, max_p99_ms, budget_s)
    most = len(candidates(usable_cores(), teacher.repository.max_batch_size, on_gpu=teacher.repository.instance_kind == "gpu"))
    needed = needed_s(table, budget_s, most)
    best = None if needed else choose(table, max_p99_ms)
    console.print(_shown(table, best, max_p99_ms))
    if needed:
        raise ConfigError(
            f"--minutes {budget_s / 60:.3g} did not do for measuring every way once, so nothing is decided and nothing written;"
            f" here it takes about {math.ceil(needed / 60)}: give --minutes {math.ceil(needed / 60)}"
        )
    if best is None:
        quickest = min((row for row in table if row.p99_ms is not None), key=lambda row: row.p99_ms or 0.0, default=None)
        if quickest is None:
            raise ConfigError(f"nothing could be measured: {table[0].note}")
        raise ConfigError(
            f"nothing keeps p99 within {max_p99_ms:g} ms; the quickest was batch {quickest.batch_size} with {quickest.p99_ms:.1f} ms:"
            " raise --max-p99-ms, or take a smaller teacher"
        )
    settings = settings_for(best.candidate, teacher.repository, max_p99_ms, best.images_per_s)
    run_version_so(repository, name, settings)
    tuning = Tuning(
        model=name,
        fingerprint=info.fingerprint,
        max_p99_ms=max_p99_ms,
        num_cores=usable_cores(),
        chosen={field: value for field, value in settings.model_dump(mode="json").items() if field in TUNED_FIELDS},
        table=[row.model_dump(mode="json") for row in table],
    )
    path = write_tuning(repository.parent, tuning)
    for field in fixed_fields(teacher.repository):
        if getattr(teacher.repository, field) != getattr(settings, field):
            console.print(
                f"  the run file sets teacher.repository.{field}, which wins at the next export: take that line out to keep the tuning"
            )
    console.print(
        f"chosen: batches of {best.batch_size}, {best.instance_count} instance(s) of {best.intra_op_threads} thread(s):"
        f" {best.images_per_s:.0f} images/s, p99 {best.p99_ms:.1f} ms; in {repository / name / 'config.pbtxt'} and {path}",
        markup=False,
    )
    return settings


def settings_for(
    candidate: Candidate, base: RepositorySettings, max_p99_ms: float, images_per_s: float | None = None
) -> RepositorySettings:
    """How Triton is to be told to run the teacher as `candidate` says; with the queue of `base` as long as its rate is not known."""
    batch_size = candidate.batch_size
    # As many single images as can be answered within the limit; a longer queue only makes everybody late.
    in_time = base.max_queue_size if images_per_s is None else max(batch_size, int(images_per_s * max_p99_ms / 1000))
    return base.replace(
        preferred_batch_sizes=(batch_size,),
        max_queue_delay_us=0 if batch_size == 1 else min(base.max_queue_delay_us, int(1000 * max_p99_ms * DELAY_SHARE)),
        max_queue_size=min(in_time, LARGEST_QUEUE),
        instance_count=candidate.instance_count,
        intra_op_threads=candidate.intra_op_threads,
        warmup_batch_sizes=tuple(sorted({1, batch_size})),
    )


def _measure(
    repository: Path, info: TeacherInfo, base: RepositorySettings, server: ServerSettings, max_p99_ms: float, budget_s: float
) -> Sequence[Measured]:
    """The table, from a Triton that is started for it and stopped again."""
    import numpy as np

    from distill.errors import ServerStartError
    from distill.progress import ProgressLine
    from export.triton_repository import model_config
    from teacher_server.activation import triton_control
    from teacher_server.serve import why_no_triton
    from teacher_server.triton_home import find_triton, triton_home
    from teacher_server.triton_process import TritonProcess
    from teacher_server.tuning import Tuner, candidates, usable_cores

    home = find_triton(triton_home(server.triton.home))
    if home is None or why_no_triton(server):
        raise ServerStartError(f"`distill tune` measures the real Triton, but {why_no_triton(server)}")
    size = info.preprocessing.image_size
    wanted = candidates(usable_cores(), base.max_batch_size, budget_s=budget_s, on_gpu=base.instance_kind == "gpu")
    largest = max(candidate.batch_size for candidate in wanted)
    crops_NHWC = np.random.default_rng(0).integers(0, 256, (largest, size, size, 3), dtype=np.uint8)
    timeout_s = server.triton.start_timeout_s
    with (
        TritonProcess(home, repository, info.name, repository.parent / "logs", start_timeout_s=timeout_s) as triton,
        triton_control(triton.url, load_timeout_s=timeout_s) as control,
    ):
        tuner = Tuner(
            control, info.name, crops_NHWC, lambda candidate: model_config(info, settings_for(candidate, base, max_p99_ms)), max_p99_ms
        )
        with ProgressLine("tune", total=tuner.num_measurements(len(wanted)), unit="measurements") as line:
            for candidate in tuner.measure_all(wanted, budget_s):
                line.update(1, f"batch {candidate.batch_size} x {candidate.instance_count} x {candidate.intra_op_threads} threads")
        return tuner.table()


def _shown(table: Sequence[Measured], best: Measured | None, max_p99_ms: float) -> Any:
    from rich.table import Table

    shown = Table(title=f"limit: p99 {max_p99_ms:g} ms", title_justify="left")
    for heading in ("batch", "instances", "threads", "images/s", "p50 ms", "p99 ms", "rounds", ""):
        shown.add_column(heading, justify="left" if heading == "" else "right")
    for row in table:
        late = row.p99_ms is not None and row.p99_ms > max_p99_ms
        shown.add_row(
            str(row.batch_size),
            str(row.instance_count),
            str(row.intra_op_threads),
            *(
                "-" if value is None else f"{value:.{digits}f}"
                for value, digits in ((row.images_per_s, 0), (row.p50_ms, 1), (row.p99_ms, 1))
            ),
            str(row.num_rounds),
            "chosen" if row is best else row.note or ("over the limit" if late else ""),
        )
    return shown
