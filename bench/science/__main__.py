"""`python -m bench.science run ...` trains what is missing, `python -m bench.science table` writes the table and the picture.

    python -m bench.science run --dataset fashion --images WHERE/fashion --seeds 0 --seeds 1 --seeds 2 --minutes 110
    python -m bench.science table

Every stage is kept in the cache under the hash of its settings, so that the table can be built in pieces: `run` stops before the first arm
that it would begin after `--minutes`, and goes on from there the next time; inside a stage it goes on from its last checkpoint.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch

from bench.science.arms import ARMS, IMAGE_SIZE, SETTINGS, Arms, self_training, small_training
from bench.science.search import ROWS, score_candidates
from bench.science.stages import Stages
from bench.science.table import write_table
from distill.config import digest_of
from distill.data_settings import DataSettings, ImagesSettings
from distill.image_sets import class_names_of, open_unlabelled
from distill.machine import describe_machine
from distill.progress import console, duration

RESULTS = Path(__file__).parent / "results"
FRACTIONS = (0.01, 0.1)


@click.group()
def main() -> None:
    """The science table."""


@main.command()
@click.option("--dataset", type=click.Choice(list(SETTINGS)), required=True)
@click.option("--images", type=click.Path(exists=True, path_type=Path), required=True, help="What bench.science.datasets wrote.")
@click.option("--cache", type=click.Path(path_type=Path), default=Path("runs/science"), show_default=True)
@click.option("--seeds", type=int, multiple=True, default=(0,), show_default=True, help="Give it several times for several seeds.")
@click.option("--arm", "only", help="Only the arms whose name holds these words.", default="")
@click.option(
    "--fraction", "fractions", type=click.Choice(FRACTIONS), multiple=True, default=FRACTIONS, show_default=True, help="Of labels."
)
@click.option(
    "--threads", type=int, default=0, help="Threads of torch; 1 where the cores are shared with something else. 0: as many as cores."
)
@click.option("--minutes", type=float, default=120, show_default=True, help="No arm is begun after this time.")
def run(
    dataset: str, images: Path, cache: Path, seeds: tuple[int, ...], only: str, fractions: tuple[float, ...], threads: int, minutes: float
) -> None:
    """Train what is missing; every finished arm is written to results/DATASET.json at once."""
    torch.set_num_threads(threads or torch.get_num_threads())
    started = time.monotonic()
    path = RESULTS / f"{dataset}.json"
    kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"cells": []}
    for seed, fraction, arm, arms in _cells(dataset, images, cache / dataset, seeds, threads):
        if only not in arm or fraction not in fractions:
            continue
        if time.monotonic() - started > 60 * minutes:
            console.print(f"stopped after {duration(time.monotonic() - started)}; the same command goes on")
            break
        scores = ARMS[arm](arms)
        setting = _described(dataset)
        cell = {"arm": arm, "fraction": fraction, "seed": seed, **scores, "machine": _machine(), "setting": digest_of(setting)}
        kept["cells"] = [c for c in kept["cells"] if (c["arm"], c["fraction"], c["seed"]) != (arm, fraction, seed)] + [cell]
        kept |= {"dataset": dataset, "setting": setting}
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(kept, indent=1) + "\n")
        console.print(f"[bold]{arm}[/bold], {fraction:.0%} of the labels, seed {seed}: top-1 {scores['top1']:.2%}")


@main.command()
@click.option("--dataset", type=click.Choice(list(SETTINGS)), required=True)
@click.option("--images", type=click.Path(exists=True, path_type=Path), required=True, help="What bench.science.datasets wrote.")
@click.option("--cache", type=click.Path(path_type=Path), default=Path("runs/science"), show_default=True)
@click.option("--row", "rows", type=click.Choice(list(ROWS)), multiple=True, default=list(ROWS), show_default=True)
@click.option("--threads", type=int, default=0, help="Threads of torch; 0: as many as cores.")
def search(dataset: str, images: Path, cache: Path, rows: tuple[str, ...], threads: int) -> None:
    """Score the candidates for stage 2 and its control on the validation images; results/search/DATASET.json."""
    torch.set_num_threads(threads or torch.get_num_threads())
    path = RESULTS / "search" / f"{dataset}.json"
    kept: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    tests = _stages(images, cache / dataset, "test", 0, threads)
    validations = _stages(images, cache / dataset / "search", "validation", 0, threads)
    for found in score_candidates(dataset, tests, validations, rows):
        kept = [old for old in kept if {**old, "top1": 0} != {**found, "top1": 0}] + [found]
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text("[\n" + ",\n".join(" " + json.dumps(line) for line in kept) + "\n]\n")
        console.print(f"[bold]{found['row']}[/bold]: {found}")


def _cells(dataset: str, images: Path, cache: Path, seeds: tuple[int, ...], threads: int) -> Iterator[tuple[int, float, str, Arms]]:
    for seed in seeds:
        stages = _stages(images, cache, "test", seed, threads)
        for fraction in FRACTIONS:
            for arm in ARMS:
                yield seed, fraction, arm, Arms(SETTINGS[dataset], stages, fraction)


def _stages(images: Path, cache: Path, scored_on: str, seed: int, threads: int) -> Stages:
    def shards(part: str) -> ImagesSettings:
        return ImagesSettings(path=str(images / f"{part}-*.tar"))

    train = shards("train")
    data = DataSettings(unlabelled=train, labelled=train, test=shards(scored_on), image_size=IMAGE_SIZE, crop_ratio=1.0, window_shards=100)
    data = data.replace(class_names=list(class_names_of(data)))
    return Stages(cache, data, open_unlabelled(data).digest(), seed, threads)


def _machine() -> str:
    return describe_machine() + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "")


def _described(dataset: str) -> dict[str, Any]:
    setting = SETTINGS[dataset]
    return {
        "pretrain": setting.pretrain.model_dump(mode="json"),
        "finetune": {f"{fraction:g}": s.model_dump(mode="json") for fraction, s in setting.finetune.items()},
        "supervised": {f"{fraction:g}": s.model_dump(mode="json") for fraction, s in setting.supervised.items()},
        "supervised_student": {f"{fraction:g}": s.model_dump(mode="json") for fraction, s in setting.supervised_student.items()},
        "self_distill": self_training(setting).model_dump(mode="json"),
        "distill": small_training(setting).model_dump(mode="json"),
    }


@main.command()
def table() -> None:
    """Write results/TABLE.md and results/science.png from results/*.json."""
    for path in write_table(RESULTS, list(ARMS)):
        console.print(f"wrote {path}")


if __name__ == "__main__":
    main()
