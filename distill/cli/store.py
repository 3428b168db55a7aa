"""`distill store`: plan, look at, check, compact and compare the stores of soft labels, in a folder or on an object store.

Tables for people, `--json` for programs (then stdout holds nothing else). Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")

_JSON = click.option("--json", "as_json", is_flag=True, help="JSON on stdout, and nothing else there.")
_CONFIG = click.option("--config", type=click.Path(path_type=Path), help="The run file; its stores are meant where no STORE is named.")
_WORDS = click.argument("words", nargs=-1, metavar="[STORE]... [SECTION.KEY=VALUE]...")


@click.group("store", short_help="Soft-label stores: plan, stats, verify, compact, diff.")
def store() -> None:
    """The stores of soft labels. STORE is a folder or a URL such as s3://bucket/labels: one store, or the folder of several."""


@store.command()
@click.option("--config", type=click.Path(path_type=Path), required=True, help="The run file.")
@click.option("--sample", type=click.IntRange(min=1), default=256, show_default=True, help="Random crops that the teacher is asked about.")
@_JSON
@click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
def plan(config: Path, sample: int, as_json: bool, overrides: tuple[str, ...]) -> None:
    """What the labels of a run would cost, before a job starts: asks the run's teacher for a sample. Needs export-teacher."""
    from distill.cli.store_tables import plan_table

    with _output(as_json) as say, _asking(config, overrides) as job:
        from student_trainer.store_sampling import plan_store

        with _progress("sample", sample, "crops") as line:
            made = plan_store(job, sample, line.update)
        say(made.model_dump(mode="json"), [plan_table(made)])


@store.command()
@_CONFIG
@click.option("--quick", is_flag=True, help="From the manifest alone: no sizes of records, encodings and errors.")
@_JSON
@_WORDS
def stats(config: Path | None, quick: bool, as_json: bool, words: tuple[str, ...]) -> None:
    """Labels, segments, bytes, how complete each view is, encodings and errors."""
    from distill.cli.store_tables import stats_tables

    with _output(as_json) as say:
        from student_trainer.store_stats import summarize

        found = []
        for opened in _opened(config, words):
            num_images = _num_images(config, words, opened.identity.images)
            with _progress("read", 0 if quick else len(opened.segments), "segments") as line:
                found.append(summarize(opened, num_images, quick, _one_more(line)))
        say({"stores": [summary.model_dump(mode="json") for summary in found]}, [t for summary in found for t in stats_tables(summary)])


@store.command()
@_CONFIG
@click.option("--repair", is_flag=True, help="Put damaged segments into quarantine, to be asked for again; merge labels kept twice.")
@click.option("--against-teacher", type=click.IntRange(min=1), metavar="N", help="Ask the run's teacher again about N random labels.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Which labels --against-teacher draws.")
@click.option(
    "--logit-tolerance",
    type=click.FloatRange(min=0),
    default=0.001,
    show_default=True,
    help="Noise of the engine between two answers about one crop: largest difference of a logit. fp16 engines need about 0.05.",
)
@_JSON
@_WORDS
def verify(
    config: Path | None, repair: bool, against_teacher: int | None, seed: int, logit_tolerance: float, as_json: bool, words: tuple[str, ...]
) -> None:
    """Checksum of every segment, every record decoded, no label twice, the same image everywhere. Exit code 1 if something is wrong."""
    from distill.errors import ConfigError

    if against_teacher is not None:
        if config is None:
            raise ConfigError("--against-teacher asks the teacher of a run: say which with --config RUN_FILE")
        if repair:
            raise ConfigError("--repair mends, --against-teacher measures: run the first, then the second")
        return _verify_against_teacher(config, words, against_teacher, seed, logit_tolerance, as_json)
    with _output(as_json) as say:
        _verify_all(config, words, repair, say)


@store.command()
@_CONFIG
@click.option("--remove-leftovers", is_flag=True, help="Also take away what crashed writers left. Only while nobody writes.")
@_JSON
@_WORDS
def compact(config: Path | None, remove_leftovers: bool, as_json: bool, words: tuple[str, ...]) -> None:
    """Merge the small segments of each image shard and view into one. Readers and writers may go on meanwhile."""
    from distill.cli.store_tables import compact_table

    with _output(as_json) as say:
        from student_trainer.store_compact import compact as compact_store

        done = {}
        for opened in _opened(config, words):
            with _progress("compact", len(opened.manifest.units()), "units") as line:
                done[opened.files.where] = compact_store(opened, _one_more(line), remove_leftovers)
        say({"stores": [{"where": where, **d.model_dump(mode="json")} for where, d in done.items()]}, [compact_table(done)])


@store.command()
@click.argument("a")
@click.argument("b")
@click.option(
    "--temperature", type=click.FloatRange(min=0, min_open=True), default=1.0, show_default=True, help="Where labels are compared."
)
@_JSON
def diff(a: str, b: str, temperature: float, as_json: bool) -> None:
    """Labels that only A or only B has, and how far those that both have differ."""
    from distill.cli.store_tables import diff_table

    with _output(as_json) as say:
        from student_trainer.open_store import find_stores, open_any_store
        from student_trainer.store_stats import difference

        stores = [open_any_store(_only(find_stores(where), where)) for where in (a, b)]
        total = len({(s.view, s.shard) for opened in stores for s in opened.segments})
        with _progress("compare", total, "units") as line:
            found = difference(stores[0], stores[1], temperature, _one_more(line))
        say(found.model_dump(mode="json"), [diff_table(found)])


def _verify_all(config: Path | None, words: tuple[str, ...], repair: bool, say: Say) -> None:
    from distill.cli.store_tables import verify_tables
    from distill.errors import StoreError
    from student_trainer.store_verify import verify as verify_store

    found = {}
    for opened in _opened(config, words):
        with _progress("verify", len(opened.segments), "segments") as line:
            found[opened.files.where] = verify_store(opened, repair, _one_more(line))
    say(
        {"stores": [{"where": where, "num_open": f.num_open, **f.model_dump(mode="json")} for where, f in found.items()]},
        [table for where, f in found.items() for table in verify_tables(where, f)],
    )
    num_open = sum(f.num_open for f in found.values())
    if num_open:
        way_out = "compact merges labels kept twice; verify --repair also puts damaged segments into quarantine, to be asked for again"
        raise StoreError(f"{num_open} problems in {', '.join(w for w, f in found.items() if f.num_open)}; {way_out}")


def _verify_against_teacher(config: Path, words: tuple[str, ...], count: int, seed: int, logit_tolerance: float, as_json: bool) -> None:
    from distill.cli.store_tables import check_table
    from distill.errors import StoreError

    with _output(as_json) as say, _asking(config, _overrides(words)) as job:
        from student_trainer.open_store import find_stores, open_label_store
        from student_trainer.store_sampling import check_against_teacher

        if named := _named(words):  # must be of the run's teacher, crops and images; opening it says if not
            job = job.replace(store_folder=_only([found for where in named for found in find_stores(where)], " and ".join(named)))
        opened = open_label_store(job)
        with _progress("ask again", count, "labels") as line:
            found = check_against_teacher(opened, job, count, seed, logit_tolerance, line.update)
        say(
            {"where": opened.files.where, "num_beyond": found.num_beyond, **found.model_dump(mode="json")},
            [check_table(found, opened.files.where)],
        )
        if found.num_beyond:
            worst = next(at.worst[0] for at in found.temperatures if at.worst)
            raise StoreError(f"{found.num_beyond} labels are further from the teacher than they state (the worst: {worst})")


Say = Callable[[dict[str, Any], list[Any]], None]
"""Takes what a command found, as plain data and as tables."""


@contextmanager
def _output(as_json: bool) -> Iterator[Say]:
    """Says what was found: tables, or JSON with everything else (progress, which teacher serves) on stderr."""
    from distill.progress import console

    def say(data: dict[str, Any], tables: list[Any]) -> None:
        if as_json:
            click.echo(json.dumps(data, indent=1))
        else:
            for table in tables:
                console.print(table)

    before, console.stderr = console.stderr, as_json
    try:
        yield say
    finally:
        console.stderr = before


@contextmanager
def _asking(config: Path, overrides: tuple[str, ...]) -> Iterator[Any]:
    """The run's labelling job, its teacher served while the block lasts."""
    from distill.cli.run_file import read_run_file

    file = read_run_file(config, list(overrides))

    from distill.cli import verbs
    from distill.cli.run import Run

    run = Run(file)
    with verbs.served_teacher(run) as served:
        yield run.distill_job(served.address, run.teacher, run.file.train)


def _progress(title: str, total: int, unit: str) -> Any:
    from distill.progress import ProgressLine

    return ProgressLine(title, total, unit)


def _one_more(line: Any) -> Callable[..., None]:
    """Moves a progress line on by one, whatever it is told."""
    return lambda *unused: line.update(1)


def _opened(config: Path | None, words: tuple[str, ...]) -> Iterator[Any]:
    """The stores that are named, or those of the run file."""
    from distill.errors import ConfigError
    from student_trainer.open_store import find_stores, open_any_store

    named = _named(words)
    settings = None
    if config is not None:
        from distill.cli.run_file import read_run_file

        file = read_run_file(config, list(_overrides(words)))
        settings = file.store
        named = named or [file.store.path or str(Path(file.run_dir) / "store")]
    if not named:
        raise ConfigError("say which store is meant: its folder or URL, or the run file with --config")
    for where in named:
        for found in find_stores(where):
            yield open_any_store(found, settings)


def _named(words: tuple[str, ...]) -> list[str]:
    return [word for word in words if not _OVERRIDE.match(word)]


def _overrides(words: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(word for word in words if _OVERRIDE.match(word))


def _only(found: list[str], where: str) -> str:
    from distill.errors import ConfigError

    if len(found) > 1:
        raise ConfigError(f"{where} holds {len(found)} stores; name one: {', '.join(found)}")
    return found[0]


def _num_images(config: Path | None, words: tuple[str, ...], digest: str) -> int | None:
    """How many images the store is about, where the run file says so and means the same ones."""
    if config is None:
        return None
    from distill.cli.run_file import read_run_file
    from distill.image_sets import open_unlabelled

    images = open_unlabelled(read_run_file(config, list(_overrides(words))).data)
    return images.num_images if images.digest() == digest else None
