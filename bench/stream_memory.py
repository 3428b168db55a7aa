"""Does memory grow with the data set? RSS and start time of the stream's parts for growing numbers of synthetic images.

    python -m bench.stream_memory --work /tmp/stream-memory                     # writes bench/results/stream_memory.{json,md}
    python -m bench.stream_memory --work /tmp/stream-memory --most 10000        # a quick look

Each row is measured in a process of its own, in the environment that `distill` gives its processes (memory that is given back is kept for
the next batch: `distill/cluster/environment.py`). Images are JPEGs of 8 x 8 pixels in shards of 1000, so that what is seen is the
bookkeeping and not the pixels. `index` is what opening the source leaves in memory, `first batch` the time from the start of an epoch,
`steady` the RSS after `--batches` further batches. Kinds: WebDataset shards, Parquet, a folder of files; `plan` alone (sizes of shards and
the order of an epoch, no files) for as many images as nobody has; `store`, the label store's manifest with 50 views of each image.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from distill.cluster.environment import ENVIRONMENT
from distill.crops import CropRecipe
from distill.loader import CropLoader, LoaderSettings
from distill.machine import describe_machine
from distill.plan import EpochPlan
from distill.rejections import RejectionLog
from distill.sources import open_source
from student_trainer.store import Segment, SoftLabelStore, StoreIdentity

RESULTS = Path(__file__).parent / "results"
SHARD = 1000
VIEWS = 50
FILES = (10_000, 100_000, 1_000_000)
NUMBERS = (1_000_000, 100_000_000, 1_000_000_000)
"""Sizes of the `plan` rows."""

CAVEAT = (
    "RSS: growth that finds room in memory which the warm-up gave back is not seen. Sets of fewer images than the batches want end earlier."
)
Row = dict[str, Any]


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Folder for the synthetic images; kept, and used again.")
@click.option("--most", default=FILES[-1], help="Leave out sets of files with more images.")
@click.option("--batches", default=300, help="Batches after the first, before the last look.")
@click.option("--kind", "kinds", multiple=True, default=("tar", "parquet", "folder", "store", "plan"), help="What to measure.")
@click.option("--probe", nargs=2, type=(str, int), hidden=True)
def main(work: Path, most: int, batches: int, kinds: tuple[str, ...], probe: tuple[str, int] | None) -> None:
    """Measure and write the table."""
    if probe is not None:
        click.echo(json.dumps(PROBES[probe[0]](work, probe[1], batches)))
        return
    rows = []
    for kind in kinds:
        for num_images in NUMBERS if kind == "plan" else [size for size in FILES if size <= most]:
            if kind in MAKERS:
                MAKERS[kind](work / kind / str(num_images), num_images)
            words = [sys.executable, "-m", "bench.stream_memory", "--work", str(work), "--batches", str(batches)]
            words += ["--probe", kind, str(num_images)]
            told = subprocess.run(words, env={**ENVIRONMENT, **os.environ}, stdout=subprocess.PIPE, text=True, check=True)
            rows.append({"kind": kind, "images": num_images, **json.loads(told.stdout)})
            click.echo(json.dumps(rows[-1]))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "stream_memory.json").write_text(json.dumps({"machine": describe_machine(), "rows": rows}, indent=1) + "\n")
    (RESULTS / "stream_memory.md").write_text(
        f"Made by `python -m bench.stream_memory --work FOLDER`; do not edit. {describe_machine()}.\n\n{_table(rows)}"
    )


def _jpegs() -> list[bytes]:
    random, files = np.random.default_rng(0), []
    for _ in range(64):
        file = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file, "JPEG")
        files.append(file.getvalue())
    return files


def _once(make: Callable[[Path, int], None]) -> Callable[[Path, int], None]:
    """Make a set of files unless it is there whole."""

    def made(folder: Path, num_images: int) -> None:
        if not (folder / ".whole").exists():
            folder.mkdir(parents=True, exist_ok=True)
            make(folder, num_images)
            (folder / ".whole").touch()

    return made


def _make_tar(folder: Path, num_images: int) -> None:
    jpegs = _jpegs()
    for shard in range(num_images // SHARD):
        with tarfile.open(folder / f"train-{shard:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for row in range(SHARD):
                member = tarfile.TarInfo(f"{shard * SHARD + row:010d}.jpg")
                member.size = len(jpegs[row % 64])
                tar.addfile(member, io.BytesIO(jpegs[row % 64]))


def _make_parquet(folder: Path, num_images: int) -> None:
    jpegs = _jpegs()
    table = pa.table({"image": pa.array([jpegs[row % 64] for row in range(SHARD)], pa.binary())})
    for file in range(num_images // (10 * SHARD)):
        with pq.ParquetWriter(folder / f"train-{file:06d}.parquet", table.schema, use_dictionary=False) as writer:
            for _ in range(10):
                writer.write_table(table, row_group_size=SHARD)


def _make_folder(folder: Path, num_images: int) -> None:
    jpegs = _jpegs()
    for number in range(num_images):
        if number % SHARD == 0:
            part = folder / f"class-{number // SHARD:06d}"
            part.mkdir(exist_ok=True)
        (part / f"photograph-{number:010d}.jpg").write_bytes(jpegs[number % 64])


def _make_store(folder: Path, num_images: int) -> None:
    """A manifest that names a segment for each shard and view; of the files only the sizes are looked at."""
    SoftLabelStore(folder, _identity())
    lines = []
    for view in range(VIEWS):
        (folder / f"view-{view:05d}").mkdir(exist_ok=True)
        for shard in range(num_images // SHARD):
            name = f"view-{view:05d}/shard-{shard:06d}.{view * num_images + shard:012x}.parquet"
            with (folder / name).open("wb") as file:
                file.truncate(90_000)
            segment = Segment(
                view=view, shard=shard, file=name, sha256=f"{shard:064x}", num_labels=SHARD, size_bytes=90_000, temperatures=(1.0,)
            )
            lines.append(f"\n{segment.model_dump_json()}\n")
    (folder / "manifest.jsonl").write_text("".join(lines))


def _identity() -> StoreIdentity:
    return StoreIdentity(fingerprint="f" * 64, num_classes=1000, recipe=CropRecipe(image_size=8), seed=0, images="synthetic")


def _rss_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def _peak_mb() -> float:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


class _Watch:
    """Seconds and RSS since it was last looked at; imports and a warm-up lie before the first look."""

    def __init__(self) -> None:
        self.mb, self.at = _rss_mb(), time.perf_counter()

    def look(self) -> tuple[float, float]:
        mb, at = _rss_mb(), time.perf_counter()
        grown, seconds = mb - self.mb, at - self.at
        self.mb, self.at = mb, at
        return seconds, grown


def _probe_files(pattern: str) -> Callable[[Path, int, int], Row]:
    def probe(work: Path, num_images: int, batches: int) -> Row:
        folder = work / pattern.partition("/")[0]
        small = open_source(str(folder / str(FILES[0])) + pattern.partition("/")[2])  # loads what is imported late
        next(_batches(small, work))
        del small
        watch = _Watch()
        source = open_source(str(folder / str(num_images)) + pattern.partition("/")[2])
        open_s, index_mb = watch.look()
        opening_peak_mb = _peak_mb()
        stream = _batches(source, work)
        next(stream)
        first_s, first_mb = watch.look()
        count = sum(1 for _ in zip(range(batches), stream, strict=False))
        rate = count * 256 / watch.look()[0]
        return {
            "open_s": open_s,
            "index_mb": index_mb,
            "opening_peak_mb": opening_peak_mb,
            "first_batch_s": first_s,
            "first_batch_mb": first_mb,
            "steady_mb": _rss_mb(),
            "images_per_s": rate,
        }

    return probe


def _batches(source: Any, work: Path) -> Iterator[Any]:
    log = RejectionLog(work / "rejected.jsonl", 0.0)
    settings = LoaderSettings(seed=0, global_batch=256)
    return iter(CropLoader(source, CropRecipe(image_size=8), settings, lambda epoch: (epoch,), log).epoch(0))


def _probe_plan(work: Path, num_images: int, batches: int) -> Row:
    next(EpochPlan((SHARD,), 0, 0, 256).batches())
    watch = _Watch()
    sizes = np.full(num_images // SHARD, SHARD, dtype=np.int64)
    plan = EpochPlan(sizes, seed=0, epoch=0, global_batch=256)
    stream = plan.batches()
    next(stream)
    first_s, index_mb = watch.look()
    for _, _batch in zip(range(batches), stream, strict=False):
        pass
    watch.look()
    next(plan.batches(plan.num_steps - 1))
    last_s, _ = watch.look()
    return {"first_batch_s": first_s, "index_mb": index_mb, "last_batch_s": last_s, "opening_peak_mb": _peak_mb(), "steady_mb": _rss_mb()}


def _probe_store(work: Path, num_images: int, batches: int) -> Row:
    small = SoftLabelStore(work / "store" / str(FILES[0]), _identity())
    del small
    watch = _Watch()
    store = SoftLabelStore(work / "store" / str(num_images), _identity())
    open_s, index_mb = watch.look()
    store.stats()
    return {"open_s": open_s, "index_mb": index_mb, "opening_peak_mb": _peak_mb(), "steady_mb": _rss_mb()}


PROBES = {
    "tar": _probe_files("tar//train-*.tar"),
    "parquet": _probe_files("parquet//train-*.parquet"),
    "folder": _probe_files("folder"),
    "plan": _probe_plan,
    "store": _probe_store,
}
MAKERS = {"tar": _once(_make_tar), "parquet": _once(_make_parquet), "folder": _once(_make_folder), "store": _once(_make_store)}


def _table(rows: list[Row]) -> str:
    """Markdown: one line a row, and bytes an image as the slope from the smallest to the largest set of a kind."""
    lines = [
        "| kind | images | open s | index MB | peak while opening MB | first batch s | steady RSS MB | images/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [_cell(row.get(name)) for name in ("open_s", "index_mb", "opening_peak_mb", "first_batch_s", "steady_mb", "images_per_s")]
        lines.append(f"| {row['kind']} | {row['images']:,} | {' | '.join(cells)} |")
    lines += ["", "| kind | bytes an image: index | steady |", "|---|---|---|"]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        first, *_, last = [row for row in rows if row["kind"] == kind] * 2
        more = max(1, last["images"] - first["images"])
        slopes = [(last[name] - first[name]) * 1e6 / more for name in ("index_mb", "steady_mb")]
        lines.append(f"| {kind} | {slopes[0]:.2f} | {slopes[1]:.2f} |")
    return "\n".join(lines) + "\n"


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:,.2f}" if abs(value) < 10 else f"{value:,.0f}"


if __name__ == "__main__":
    main()
