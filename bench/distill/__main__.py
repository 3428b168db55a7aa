"""`python -m bench.distill run` measures, `workers`, `decoding` and `profile` look closer, `table` writes results/TABLE.md. README.md has
the commands.

In each round every arm is measured once (the control twice: first, and in the middle), each in a fresh process, one at a time, so that a
busy spell of the machine falls on all; ratios are taken within a round, and the median of the rounds counts. Every cell is written at once:
the same command goes on where it was stopped.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch

from bench.distill.cases import CASES, Case, Prepared, prepare, quick
from bench.distill.ceilings import measure_ceilings
from bench.distill.cell import ARMS, Cell
from bench.distill.decoding import measure_decoding
from bench.distill.peers_run import COMMANDS, measure_peer
from bench.distill.profile import profile as profile_arm
from bench.distill.table import write_table
from bench.distill.workers import measure_workers
from distill.cluster.environment import set_environment
from distill.machine import describe_machine
from distill.progress import console, duration

RESULTS = Path(__file__).parent / "results"
ORDER = (
    "pure",
    "live20",
    "store",
    "live50",
    "crops",
    "live200",
    "pure",
    "teacher",
    "embedded",
    "timm",
    "triton",
    "torchdistill",
    "students",
    "inline",
    "timm-pure",
)
"""The arms of a round. Those that are compared stand near to each other."""
DEFAULT_CASES = ("cifar", "photos")
ONLY_CPU = ("triton", "torchdistill")
"""The Triton that is installed here has no CUDA; torchdistill was driven on a CPU only."""
NEED_PEERS = ("timm", "timm-pure", "torchdistill")

_case = click.option("--case", "names", type=click.Choice(list(CASES)), multiple=True, default=DEFAULT_CASES, show_default=True)
_cifar = click.option("--cifar", type=click.Path(exists=True, path_type=Path), help="Folder that `bench.science.datasets cifar10` wrote.")
_cifar_teacher = click.option(
    "--cifar-teacher", type=click.Path(exists=True, path_type=Path), help="Weights of the CIFAR ResNet-56, safetensors."
)
_photos = click.option("--photos", type=click.Path(exists=True, path_type=Path), help="Tar with train/CLASS/*.JPEG.")
_cache = click.option("--cache", type=click.Path(path_type=Path, resolve_path=True), default=Path("runs/bench-distill"), show_default=True)
_threads = click.option("--threads", type=int, default=2, show_default=True, help="Of torch, of the teacher's engine, and of decoding.")
_quick = click.option("--quick", "is_quick", is_flag=True, help="Tiny sizes, to see that all of it runs; no result is kept.")


def _options(command: Any) -> Any:
    for option in (_quick, _threads, _cache, _photos, _cifar_teacher, _cifar, _case):
        command = option(command)
    return command


@click.group()
def main() -> None:
    """What distilling costs."""
    set_environment()  # as `distill` does, and for all arms alike


@main.command()
@_options
@click.option(
    "--peers", type=click.Path(exists=True, path_type=Path), help="Python of the peers' environment; without it they are left out."
)
@click.option("--timm-train", type=click.Path(exists=True, path_type=Path), help="train.py of timm's repository.")
@click.option("--peer-workers", type=int, default=2, show_default=True, help="Processes in which the peers decode.")
@click.option("--only", multiple=True, type=click.Choice(sorted(set(ORDER))), help="Only these arms, and `pure`.")
@click.option("--rounds", type=int, help="Default: the case's own, 3 for cifar and 2 for the others.")
@click.option("--minutes", type=float, default=25, show_default=True, help="No cell is begun after this time.")
def run(
    peers: Path | None,
    timm_train: Path | None,
    peer_workers: int,
    only: tuple[str, ...],
    rounds: int | None,
    minutes: float,
    **where: Any,
) -> None:
    """Measure what is missing in results/CASE.json."""
    started = time.monotonic()
    prepared = _prepare(**where)
    for number in range(rounds or max(one.case.rounds for one in prepared)):
        for one in prepared:
            if number >= (rounds or one.case.rounds):
                continue
            kept = _kept(one, where["is_quick"])
            for turn, arm in enumerate(ORDER):
                if not _is_wanted(one.case, arm, only, peers, kept) or _has(kept, number, turn, arm):
                    continue
                if time.monotonic() - started > 60 * minutes:
                    console.print(f"stopped after {duration(time.monotonic() - started)}; the same command goes on")
                    return
                cell = _measure(one, arm, peers, timm_train, peer_workers)
                kept["cells"].append({"round": number, "turn": turn, "arm": arm, **cell})
                _say(one.case, number, arm, cell)
                _write(one, kept, where["is_quick"])


def _is_wanted(case: Case, arm: str, only: tuple[str, ...], peers: Path | None, kept: dict[str, Any]) -> bool:
    if case.device != "cpu" and arm in ONLY_CPU:
        return False
    if arm in NEED_PEERS and peers is None:
        return False
    if only:
        return arm in only or arm == "pure"
    if arm == "inline":  # stands in for a peer that cannot run
        return peers is None or any("error" in cell for cell in kept["cells"] if cell["arm"] in NEED_PEERS)
    return True


def _has(kept: dict[str, Any], number: int, turn: int, arm: str) -> bool:
    return any((cell["round"], cell["turn"], cell["arm"]) == (number, turn, arm) for cell in kept["cells"])


def _measure(one: Prepared, arm: str, peers: Path | None, timm_train: Path | None, peer_workers: int) -> Cell:
    """The cell, or the reason why there is none."""
    try:
        if arm in COMMANDS:
            # Without an environment of its own `inline` runs in ours: it needs torch, torchvision and timm.
            python = Path(sys.executable) if peers is None else peers
            return measure_peer(one, arm, python.absolute(), timm_train and timm_train.absolute(), peer_workers)
        command = [sys.executable, "-m", "bench.distill.cell", one.to_json(), arm]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            console.print(done.stderr, markup=False)
            raise RuntimeError(f"{arm} failed: {done.stderr.strip().splitlines()[-1]}")
        cell: Cell = json.loads(done.stdout.strip().splitlines()[-1])
        return cell
    except RuntimeError as error:
        return {"error": str(error)}


def _say(case: Case, number: int, arm: str, cell: Cell) -> None:
    if "error" in cell:
        console.print(f"{case.name} round {number + 1} {arm:>12}: {cell['error']}", markup=False)
        return
    console.print(
        f"{case.name} round {number + 1} {arm:>12}: {cell['images_per_s']:8.1f} images/s, {cell['cpu_ms_per_image']:.2f} CPU-ms/image,"
        f" loss {cell['losses'][0][1]:.3f} to {cell['losses'][-1][1]:.3f}"
    )


@main.command()
@_options
@click.option("--workers", type=int, multiple=True, default=(1, 2, 4), show_default=True)
@click.option("--rounds", type=int, default=2, show_default=True)
def workers(workers: tuple[int, ...], rounds: int, **where: Any) -> None:
    """Training from the store with several workers of one machine, on its CPU; results/workers-CASE.json."""
    if any(CASES[name].device != "cpu" for name in where["names"]):
        raise click.UsageError("workers share cores: take a case of the CPU")
    for one in _prepare(**where):
        _fill_store(one)
        cells = []
        for number in range(rounds):
            for num_workers in workers:
                cell = {"round": number, "workers": num_workers, **measure_workers(one, num_workers)}
                cells.append(cell)
                console.print(f"{one.case.name} {num_workers} workers: {cell['images_per_s']:.1f} images/s")
        _keep(f"workers-{one.case.name}", {**_described(one), "cells": cells}, where["is_quick"], one)


@main.command()
@_options
@click.option("--rounds", type=int, default=3, show_default=True)
def decoding(rounds: int, **where: Any) -> None:
    """The stream alone, with one and with several crops a decode; results/decoding-CASE.json."""
    for one in _prepare(**where):
        several = (1, one.case.crops_per_decode)
        cells = [{"round": number, **measure_decoding(one, crops)} for number in range(rounds) for crops in several]
        for cell in cells:
            console.print(f"{one.case.name} {cell['crops_per_decode']} crops a decode: {cell['crops_per_s']:.1f} crops/s")
        _keep(f"decoding-{one.case.name}", {**_described(one), "cells": cells}, where["is_quick"], one)


@main.command()
@_options
@click.option("--py-spy", type=click.Path(exists=True, path_type=Path), required=True, help="In the peers' environment: bin/py-spy.")
@click.option("--arm", "arms", type=click.Choice(list(ARMS)), multiple=True, default=("pure", "store"), show_default=True)
def profile(py_spy: Path, arms: tuple[str, ...], **where: Any) -> None:
    """Where the time of these arms goes; results/profile-CASE.json."""
    for one in _prepare(**where):
        _fill_store(one)
        found = {arm: profile_arm(one, arm, py_spy.absolute()) for arm in arms}
        for arm, phases in found.items():
            console.print(f"{one.case.name} {arm}: " + ", ".join(f"{phase} {share:.1%}" for phase, share in phases["loop"].items()))
            console.print("    beside: " + ", ".join(f"{phase} {share:.1%}" for phase, share in phases["beside"].items()))
        path = _path(one, f"profile-{one.case.name}", where["is_quick"])
        old: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        if {**old, "arms": None} == {**json.loads(json.dumps(_described(one))), "arms": None}:
            found = {**old["arms"], **found}  # arms of an earlier call stay
        _keep(f"profile-{one.case.name}", {**_described(one), "arms": found}, where["is_quick"], one)


@main.command()
@click.argument("results", type=click.Path(exists=True, path_type=Path), default=RESULTS)
def table(results: Path) -> None:
    """Write TABLE.md from the results."""
    console.print(f"wrote {write_table(results)}")


def _fill_store(one: Prepared) -> None:
    """The first cell from the store fills it; what it measures is thrown away."""
    if not (one.folder / "store-1" / "filled").exists():
        _measure(one, "store", None, None, 0)


def _prepare(
    names: tuple[str, ...],
    cifar: Path | None,
    cifar_teacher: Path | None,
    photos: Path | None,
    cache: Path,
    threads: int,
    is_quick: bool,
) -> list[Prepared]:
    torch.set_num_threads(threads)
    prepared = []
    for name in names:
        if CASES[name].device != "cpu" and not torch.cuda.is_available():
            raise click.UsageError(f"case {name} needs a GPU, and torch finds none")
        images, option = (cifar, "--cifar") if name == "cifar" else (photos, "--photos")
        if images is None or (name == "cifar" and cifar_teacher is None):
            raise click.UsageError(f"case {name} needs {option}" + (" and --cifar-teacher" if name == "cifar" else ""))
        case, folder = (quick(CASES[name]), cache / "quick") if is_quick else (CASES[name], cache)
        console.print(f"preparing {name}")
        prepared.append(prepare(case, folder, images, cifar_teacher if name == "cifar" else None, threads))
    return prepared


def _described(one: Prepared) -> dict[str, Any]:
    described = {"case": asdict(one.case), "threads": one.threads, "machine": describe_machine(), "torch": torch.__version__}
    return described if one.case.device == "cpu" else {**described, "gpu": torch.cuda.get_device_name()}


def _kept(one: Prepared, is_quick: bool) -> dict[str, Any]:
    path = _path(one, one.case.name, is_quick)
    described: dict[str, Any] = json.loads(json.dumps(_described(one)))
    if not path.exists():
        return {**described, "cells": []} | ({} if one.case.device == "cpu" else {"ceilings": measure_ceilings()})
    kept: dict[str, Any] = json.loads(path.read_text())
    if {name: kept.get(name) for name in described} != described:
        raise click.ClickException(f"{path} is of another machine, case or number of threads; move it away first")
    # What failed is tried again.
    kept["cells"] = [cell for cell in kept["cells"] if "error" not in cell]
    return kept


def _path(one: Prepared, name: str, is_quick: bool) -> Path:
    return (one.folder.parent / "results" if is_quick else RESULTS) / f"{name}.json"


def _write(one: Prepared, kept: dict[str, Any], is_quick: bool) -> None:
    _keep(one.case.name, kept, is_quick, one)


def _keep(name: str, result: dict[str, Any], is_quick: bool, one: Prepared) -> None:
    path = _path(one, name, is_quick)
    path.parent.mkdir(parents=True, exist_ok=True)
    pending = path.with_suffix(".pending")
    pending.write_text(json.dumps(result, indent=1) + "\n")
    shutil.move(pending, path)


if __name__ == "__main__":
    main()
