"""Versions of a teacher in a real Triton: they change under load without a failed or a mixed answer, survive a restart, and are tuned."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf import text_format
from onnx import helper, numpy_helper
from tritonclient.grpc.model_config_pb2 import ModelConfig

from distill.cli.main import run_command
from distill.cli.serving_record import RECORD, ServingRecord, _process_start
from distill.cli.tuning import tune_teacher
from distill.errors import TeacherChanged
from export.fingerprint import stamp_teacher
from export.repository_versions import active_version, add_version
from export.settings import RepositorySettings, TeacherExportSettings
from export.top_outputs import add_top_outputs
from teacher_server.settings import ServerSettings, TritonSettings
from teacher_server.triton import TritonTeacher
from teacher_server.triton_home import TritonHome
from teacher_server.triton_process import TritonProcess, canary_label

pytestmark = pytest.mark.integration

CROPS = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8)
SETTINGS = RepositorySettings(max_batch_size=16, preferred_batch_sizes=(16,), intra_op_threads=1)
"""Batches of 40 travel as 3 messages, so that a batch could be mixed."""


@pytest.fixture
def make_teacher(tiny_teacher: Any, tmp_path: Path) -> Callable[..., Any]:
    """A stamped teacher of other weights, in a file; slow enough that some request is always under way."""

    def make(seed: int, *, bias: float = 0.0, top_outputs: int | None = None) -> tuple[Path, Any]:
        random = np.random.default_rng(seed)
        weight_CK = random.normal(0, 4, tiny_teacher.weight_CK.shape).astype(np.float32)
        bias_K = (random.normal(0, 1, 10) + bias).astype(np.float32)
        model = onnx.load(tiny_teacher.repository / "tiny" / "1" / "model.onnx")
        new = {"weight": weight_CK, "bias": bias_K}
        for tensor in model.graph.initializer:
            if tensor.name in new:
                tensor.CopyFrom(numpy_helper.from_array(new[tensor.name], tensor.name))
        slow_down(model.graph)
        if top_outputs:
            add_top_outputs(model, top_outputs)
        path = tmp_path / f"teacher_{seed}.onnx"
        onnx.save(model, path)
        info = stamp_teacher(
            path,
            name="tiny",
            class_names=tiny_teacher.info.class_names,
            preprocessing=tiny_teacher.info.preprocessing,
            top_outputs=top_outputs,
        )
        return path, dataclasses.replace(tiny_teacher, info=info, weight_CK=weight_CK, bias_K=bias_K)

    return make


def slow_down(graph: onnx.GraphProto, size: int = 1500, steps: int = 4) -> None:
    """Put work between the pixels and the logits that changes nothing: a chain of products whose sum counts 0 times."""
    add = next(node for node in graph.node if node.op_type == "Add")
    shape = numpy_helper.from_array(np.array([size, size], np.int64), "work_shape")
    spread = numpy_helper.from_array(np.full((3, size), 1e-3, np.float32), "spread")
    nothing = numpy_helper.from_array(np.zeros((size, 1), np.float32), "nothing")
    graph.initializer.extend([shape, spread, nothing])
    one = numpy_helper.from_array(np.array([1e-3], np.float32), "one")
    work = [
        helper.make_node("ConstantOfShape", ["work_shape"], ["work_matrix"], value=one),
        helper.make_node("MatMul", ["scaled", "spread"], ["work_0"]),
    ]
    work += [helper.make_node("MatMul", [f"work_{step}", "work_matrix"], [f"work_{step + 1}"]) for step in range(steps)]
    work += [
        helper.make_node("MatMul", [f"work_{steps}", "nothing"], ["worked"]),
        helper.make_node("Add", ["product", "worked"], ["product_worked"]),
    ]
    at = list(graph.node).index(add)
    add.input[0] = "product_worked"
    nodes = [*graph.node[:at], *work, *graph.node[at:]]
    del graph.node[:]
    graph.node.extend(nodes)


@dataclass
class Askers:
    """Tasks that ask without end, as the gateway does: who are you, a batch of exactly that teacher, at once again if it has changed."""

    truths: dict[str, Any]
    """fingerprint -> logits [B,K] of CROPS."""
    answers: Counter[str] = field(default_factory=Counter)
    answered: asyncio.Event = field(default_factory=asyncio.Event)
    num_changes: int = 0
    stopping: bool = False

    async def ask(self, teacher: TritonTeacher) -> None:
        in_a_row = 0
        while not self.stopping:
            info = await teacher.info()
            try:
                logits_BK = await teacher.logits(CROPS, fingerprint=info.fingerprint)
            except TeacherChanged:
                self.num_changes += 1
                in_a_row += 1
                assert in_a_row == 1, "asking again once is enough"
                continue
            in_a_row = 0
            np.testing.assert_allclose(logits_BK, self.truths[info.fingerprint], atol=1e-5)
            self.answers[info.fingerprint] += 1
            self.answered.set()

    async def until_answered(self, fingerprint: str, count: int) -> None:
        """Wait for so many further answers of one teacher."""
        wanted = self.answers[fingerprint] + count
        while self.answers[fingerprint] < wanted:
            self.answered.clear()
            await self.answered.wait()


def distill(*arguments: str) -> int:
    return run_command(["repository", *arguments])


def test_versions_change_under_load_without_a_failed_or_mixed_answer(home: TritonHome, make_teacher: Any, tmp_path: Path) -> None:
    repository = tmp_path / "run" / "model_repository"
    (first, one), (second, two) = make_teacher(1), make_teacher(2)
    add_version(repository, first, SETTINGS)
    where = ("--repository", str(repository))
    assert distill("add", str(second), *where) == 0
    assert active_version(repository, "tiny") == 1
    prints = {1: one.info.fingerprint, 2: two.info.fingerprint}

    async def scenario(triton: TritonProcess) -> Askers:
        askers = Askers({teacher.info.fingerprint: teacher.logits(CROPS) for teacher in (one, two)})
        teachers = [TritonTeacher(triton.url, "tiny") for _ in range(2)]
        # Several tasks on one client, as in the gateway, where one task's refresh must not change what another has asked.
        tasks = [asyncio.create_task(askers.ask(teacher)) for teacher in teachers for _ in range(4)]
        try:
            for version in (2, 1, 2):
                before = prints[3 - version]
                await watched(tasks, askers.until_answered(before, 8))
                assert await watched(tasks, asyncio.to_thread(distill, "activate", "tiny", str(version), *where)) == 0
                seen = askers.answers[before]
                await watched(tasks, askers.until_answered(prints[version], 3 * len(tasks)))
                assert askers.answers[before] - seen <= len(tasks), "what was under way is answered, and nothing asked later"
        finally:
            askers.stopping = True
            await asyncio.gather(*tasks)
            for teacher in teachers:
                await teacher.close()
        return askers

    with TritonProcess(home, repository, "tiny", tmp_path) as triton:
        service = ServingRecord(
            pid=os.getpid(),
            process_start=_process_start(os.getpid()),
            model="tiny",
            repository=str(repository),
            triton_url=triton.url,
            gateway_url="http://127.0.0.1:1",
        )
        (repository.parent / RECORD).write_text(service.model_dump_json())
        askers = asyncio.run(scenario(triton))
        assert askers.num_changes >= 3, "some task was told each time"
        assert active_version(repository, "tiny") == 2
        triton.restart()
        assert triton.ask_canary().fingerprint == prints[2]
        assert distill("remove", "tiny", "2", *where) == 2
        assert distill("remove", "tiny", "1", *where) == 0


async def watched(tasks: list[asyncio.Task[None]], work: Any) -> Any:
    """The result of `work`; the failure of a task that asks ends the wait at once."""
    working = asyncio.ensure_future(work)
    done, _ = await asyncio.wait([working, *tasks], return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()
    assert working.done(), "an asker ended"
    return working.result()


@pytest.mark.parametrize("top_outputs", [None, 3], ids=["same tensors", "other tensors"])
def test_a_version_that_gives_no_label_never_takes_the_place(
    home: TritonHome, make_teacher: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], top_outputs: int | None
) -> None:
    repository = tmp_path / "model_repository"
    first, one = make_teacher(1)
    add_version(repository, first, SETTINGS)
    add_version(repository, make_teacher(3, bias=np.nan, top_outputs=top_outputs)[0], SETTINGS)
    (damaged := repository / "tiny" / "2" / "model.onnx").read_bytes()
    config = (repository / "tiny" / "config.pbtxt").read_bytes()
    with TritonProcess(home, repository, "tiny", tmp_path) as triton:
        assert distill("activate", "tiny", "2", "--repository", str(repository), "--triton", triton.url) == 1
        assert "version 2 of tiny gives no label" in capsys.readouterr().err
        assert canary_label(triton.url, "tiny") == one.info
        assert distill("activate", "tiny", "1", "--repository", str(repository), "--triton", triton.url) == 0
        assert "was serving it already" in capsys.readouterr().out
        assert canary_label(triton.url, "tiny") == one.info
        triton.restart()
        assert triton.ask_canary() == one.info
        add_version(repository, make_teacher(4, top_outputs=3)[0], SETTINGS)
        assert distill("activate", "tiny", "3", "--repository", str(repository), "--triton", triton.url) == 0
        assert canary_label(triton.url, "tiny").top_outputs == 3
        assert distill("activate", "tiny", "1", "--repository", str(repository), "--triton", triton.url) == 0
    assert (repository / "tiny" / "config.pbtxt").read_bytes() == config
    assert damaged.is_file()


def test_a_short_tuning_chooses_within_the_limit_and_leaves_nothing_running(
    home: TritonHome, make_teacher: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repository = tmp_path / "model_repository"
    add_version(repository, make_teacher(1)[0], SETTINGS)
    teacher = TeacherExportSettings(name="tiny", repository=SETTINGS.replace(max_batch_size=1))
    server = ServerSettings(triton=TritonSettings(home=str(home.path)))
    chosen = tune_teacher(repository, teacher, server, 60_000, budget_s=15)
    said = capsys.readouterr().out
    assert "chosen" in said
    config = text_format.Parse((repository / "tiny" / "config.pbtxt").read_text(), ModelConfig())
    assert list(config.dynamic_batching.preferred_batch_size) == list(chosen.preferred_batch_sizes)
    assert config.instance_group[0].count == chosen.instance_count
    assert config.parameters["intra_op_thread_count"].string_value == str(chosen.intra_op_threads)
    kept = json.loads((tmp_path / "tuning.json").read_text())
    measured = [row for row in kept["table"] if row["num_rounds"]]
    assert measured
    row = next(
        row
        for row in measured
        if [row["batch_size"]] == kept["chosen"]["preferred_batch_sizes"]
        and row["instance_count"] == chosen.instance_count
        and row["intra_op_threads"] == chosen.intra_op_threads
    )
    alike = [other["images_per_s"] for other in measured if other["num_rounds"] == row["num_rounds"]]
    assert row["images_per_s"] >= 0.97 * max(alike)
    mark = f"distill_triton_{os.getpid()}_".encode()
    assert not [entry for entry in Path("/proc").iterdir() if entry.name.isdigit() and mark in command_line(entry)]


def command_line(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:  # it ended while we looked
        return b""
