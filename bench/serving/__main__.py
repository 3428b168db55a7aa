"""`python -m bench.serving run` measures, `idle` and `soak` look at our service alone, `table` writes results/TABLE.md.

    python -m venv peers && peers/bin/pip install -c constraints.txt -r bench/serving/peers/requirements.txt
    python -m bench.serving run --teacher resnet50 --peers peers/bin/python
    python -m bench.serving run --teacher small --peers peers/bin/python
    python -m bench.serving table

In each round every system is measured under every load, one system at a time, so that a busy spell of the machine falls on all; ratios are
taken within a round, and the median of the rounds counts.
"""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from bench.serving.load import LOADS, Load, cpu_seconds, measure
from bench.serving.soak import soak
from bench.serving.systems import ALONE, PEERS, SYSTEMS, Bench, check, ours
from bench.serving.table import write_table
from bench.serving.teachers import TEACHERS, make_repository
from distill.machine import describe_machine
from distill.progress import console

RESULTS = Path(__file__).parent / "results"
Cell = dict[str, Any]


@click.group()
def main() -> None:
    """What serving costs."""


@main.command()
@click.option("--teacher", "name", type=click.Choice(list(TEACHERS)), required=True)
@click.option(
    "--peers", type=click.Path(exists=True, path_type=Path), help="Python of the peers' environment; without it they are left out."
)
@click.option("--system", "only", type=click.Choice(list(SYSTEMS)), multiple=True, help="Only these and the engine; nothing is kept.")
@click.option("--rounds", type=int, default=3, show_default=True)
@click.option("--threads", type=int, default=os.cpu_count() or 1, show_default=True, help="Of the engine, in every system.")
@click.option("--cache", type=click.Path(path_type=Path), default=Path("runs/bench-serving"), show_default=True)
@click.option("--dry", is_flag=True, help="Keep no result.")
def run(name: str, peers: Path | None, only: tuple[str, ...], rounds: int, threads: int, cache: Path, dry: bool) -> None:
    """Measure every system with one teacher; every cell is written at once."""
    bench = _bench(name, cache, threads, peers)
    wanted = [system for system in SYSTEMS if _is_wanted(system, only, bench)]
    cells: list[Cell] = []
    for number in range(rounds):
        for system in [*wanted, "engine"]:  # the engine first and last, so that a drift of the machine is not in the ratios
            for cell in asyncio.run(_cells(bench, system)):
                cells.append({"round": number, "system": system, **cell})
                console.print(
                    f"round {number + 1}/{rounds} {system:>9} {cell['load']:>7}: {cell['images_per_s']:8.1f} images/s,"
                    f" p50 {cell['p50_ms']:.1f} ms, p99 {cell['p99_ms']:.1f} ms, {cell['cpu_ms_per_image']:.2f} CPU-ms/image"
                )
        if not dry and not only:  # a part would take the place of the whole
            _keep(name, {"teacher": name, "machine": describe_machine(), "threads": threads, "rounds": number + 1, "cells": cells})


def _is_wanted(system: str, only: tuple[str, ...], bench: Bench) -> bool:
    if system == "engine":
        return True
    if system in PEERS and bench.peers_python is None:
        return False
    return not only or system in only


async def _cells(bench: Bench, system: str) -> list[Cell]:
    """The system under each load that means something to it; started anew for each batch size."""
    loads = [Load(1, 16)] if system == "jpeg" else [Load(32, 1)] if system == "decode" else list(LOADS)
    if system in ALONE:
        loads = list(dict.fromkeys(Load(load.batch, 1) for load in loads))
    cells = []
    for batch in sorted({load.batch for load in loads}):
        async with SYSTEMS[system](bench, batch) as running:
            await check(bench, running, batch, files=system in ("decode", "jpeg"))
            for load in (load for load in loads if load.batch == batch):
                cost = await measure(running.ask, load, _num_images(bench, load), running.pids)
                cells.append({"load": str(load), **asdict(cost)})
    return cells


def _num_images(bench: Bench, load: Load) -> int:
    """One request at a time is slower, and needs fewer of them for a steady number."""
    return bench.teacher.num_images // (8 if load.batch * load.concurrency == 1 else 1)


@main.command()
@click.option("--seconds", type=float, default=60, show_default=True)
@click.option("--cache", type=click.Path(path_type=Path), default=Path("runs/bench-serving"), show_default=True)
def idle(seconds: float, cache: Path) -> None:
    """The share of one core that our service takes when nobody asks; results/idle.json."""

    async def measure_idle(bench: Bench) -> float:
        async with ours(bench) as (_, pid):
            await asyncio.sleep(5)  # the start is over
            before = cpu_seconds([pid])
            await asyncio.sleep(seconds)
            return (cpu_seconds([pid]) - before) / seconds

    share = asyncio.run(measure_idle(_bench("small", cache)))
    console.print(f"idle: {share:.2%} of a core over {seconds:g} s")
    _keep("idle", {"machine": describe_machine(), "seconds": seconds, "share_of_a_core": round(share, 5)})


@main.command("soak")
@click.option("--minutes", type=float, default=10, show_default=True)
@click.option("--cache", type=click.Path(path_type=Path), default=Path("runs/bench-serving"), show_default=True)
def soak_command(minutes: float, cache: Path) -> None:
    """Mixed load, good and bad requests, on the small teacher; results/soak.json. Exits 1 if an answer was wrong or none came."""

    async def run_soak(bench: Bench) -> dict[str, Any]:
        async with ours(bench) as (urls, pid):
            return await asyncio.to_thread(soak, bench, urls["rest"], pid, minutes, console.print)

    result = asyncio.run(run_soak(_bench("small", cache)))
    console.print(result)
    _keep("soak", {"machine": describe_machine(), **result})
    if result["num_wrong"] or result["hung"]:
        raise SystemExit(1)


def _bench(name: str, cache: Path, threads: int = os.cpu_count() or 1, peers: Path | None = None) -> Bench:
    teacher, folder = TEACHERS[name], cache / f"{name}-{threads}"
    folder.mkdir(parents=True, exist_ok=True)
    # Absolute, but not resolved: a virtual environment's python is a link whose place says which packages it sees.
    return Bench(teacher, make_repository(teacher, folder, threads), threads, peers and peers.absolute(), folder)


def _keep(name: str, result: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


@main.command()
def table() -> None:
    """Write results/TABLE.md from results/*.json."""
    console.print(f"wrote {write_table(RESULTS)}")


if __name__ == "__main__":
    main()
