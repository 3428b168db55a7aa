"""Run by test_label_units.py: one labelling job, the real label path and store, the fake teacher.

    python label_in_processes.py STORE IDENTITY_JSON REJECTED CLAIM_S DELAY_S

Prints "asked N" for every question to the teacher, "unit VIEW SHARD ASKED" for every unit done, and "done" at the end.
"""

from __future__ import annotations

import asyncio
import os
import sys
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

from conftest import RECIPE, MemorySource  # beside this file

from distill.loader import CropLoader, LoaderSettings
from distill.rejections import RejectionLog
from student_trainer.label_path import LabelPath, LabelRules
from student_trainer.label_units import Unit, UnitDone, UnitLabeller, label_left, units_left
from student_trainer.store import SoftLabelStore, StoreIdentity
from student_trainer.store_claims import Claims
from teacher_server.fake import FakeTeacher

NUM_VIEWS = 5
BATCH = 3


def tell(*words: object) -> None:
    """One line, at once, however this process ends."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


class TellingTeacher(FakeTeacher):
    """Says how many crops each question is about."""

    async def _infer(self, crops_BHWC, temperature_B1, names):  # type: ignore[no-untyped-def]
        answer = await super()._infer(crops_BHWC, temperature_B1, names)
        tell("asked", len(crops_BHWC))
        return answer


def main(folder: str, identity: str, rejected: str, claim_s: str, delay_s: str) -> None:
    source = MemorySource()
    store = SoftLabelStore(folder, StoreIdentity.model_validate_json(identity))
    rejections = RejectionLog(Path(rejected), 0.0)
    loader = CropLoader(source, RECIPE, LoaderSettings(0, BATCH, drop_last=False, shuffle=False), lambda epoch: (epoch,), rejections)
    rules = LabelRules(temperature=1.0, temperatures=(1.0,), max_tv=0.02, patience_s=60)
    with asyncio.Runner() as runner, Claims(store.files, float(claim_s)) as claims:

        async def open_path() -> LabelPath:
            return LabelPath(SoftLabelStore(folder, store.identity), TellingTeacher(delay_s=float(delay_s)), rules)

        labeller = UnitLabeller(loader, runner.run(open_path()), claims, rejections, BATCH, in_flight=1)

        def run(units: list[Unit], over: Mapping[str, bytes]) -> Iterator[tuple[Unit, UnitDone]]:
            for unit in units:
                yield unit, runner.run(labeller.label(*unit))

        sizes = list(source.sizes)
        left = units_left(store, sizes, NUM_VIEWS, rules)
        for (view, shard), done in label_left(store, sizes, left, rules, uuid.uuid4().hex, run, float(claim_s)):
            tell("unit", view, shard, done.asked)
    tell("done")


if __name__ == "__main__":
    main(*sys.argv[1:])
