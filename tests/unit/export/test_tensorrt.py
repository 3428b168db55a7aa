"""All of the engine builder that needs no GPU: what TensorRT would be told, the gate before the repository, and what is written.

TensorRT is played by objects that note what is called; an engine is played by ONNX Runtime.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format
from PIL import Image
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from distill.errors import ConfigError, DistillError, ParityError, StageMissing
from distill.teacher_info import METADATA_KEY, TeacherInfo
from export.runners import OnnxRunner
from export.settings import PARITY_OF, RepositorySettings
from export.tensorrt import (
    CARD_FILE,
    PLAN_FILE,
    BuildOptions,
    EngineCard,
    Profile,
    build_plan,
    builder_config,
    main,
    network_flags,
    parse_arguments,
    profile_of,
    require_package,
    sha256_of,
)
from export.tensorrt_engine import checked, gpu_name
from export.tensorrt_model import info_in, info_of, place_engine, plan_config, read_config
from export.triton_repository import model_config, write_repository

ROOT = Path(__file__).parents[3]
OPTIONS = BuildOptions(profile=Profile(1, 32, 64), image_size=16, workspace_bytes=2**30)


def read_card(folder: Path) -> EngineCard | None:
    """What a version's folder says of its engine; None where the engine is not the one that the card is of."""
    card = EngineCard.model_validate_json((folder / CARD_FILE).read_text(encoding="utf-8"))
    return card if card.plan_sha256 == sha256_of(folder / PLAN_FILE) else None


class Flags:
    """A TensorRT enum with some members."""

    def __init__(self, **members: int) -> None:
        self.__dict__.update(members)


def tensorrt_of(version: str, builder_flags: dict[str, int], typed: bool = True) -> Any:
    return SimpleNamespace(
        __version__=version,
        NetworkDefinitionCreationFlag=Flags(**({"STRONGLY_TYPED": 1} if typed else {})),
        BuilderFlag=Flags(**builder_flags),
        MemoryPoolType=Flags(WORKSPACE="workspace"),
    )


TEN = tensorrt_of("10.4.0", {"FP16": 0, "INT8": 1, "TF32": 7})
ELEVEN = tensorrt_of("11.4.0", {"TF32": 7})


class Builder:
    """Notes every call on itself, its profile and its configuration."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            self.calls.append((name, *arguments, *named.items()))
            return self

        return call


class TestBuild:
    @pytest.mark.parametrize(
        ("max_batch", "preferred", "profile"),
        [(256, [32, 64, 128], (1, 128, 256)), (64, [32, 128], (1, 32, 64)), (8, [32], (1, 8, 8)), (1, [], (1, 1, 1))],
    )
    def test_profile(self, max_batch: int, preferred: list[int], profile: tuple[int, int, int]) -> None:
        assert tuple(profile_of(max_batch, preferred)) == profile

    @pytest.mark.parametrize(("max_batch", "preferred"), [(0, []), (4, [0])])
    def test_impossible_batches(self, max_batch: int, preferred: list[int]) -> None:
        with pytest.raises(ConfigError, match="at least 1"):
            profile_of(max_batch, preferred)

    def test_the_graph_decides_the_precision(self) -> None:
        assert network_flags(TEN, "graph") == network_flags(ELEVEN, "graph") == 2
        assert network_flags(tensorrt_of("8.6", {"FP16": 0}, typed=False), "graph") == 0
        assert network_flags(TEN, "fp16") == 0
        with pytest.raises(ConfigError, match=r"TensorRT 11.4.0 takes the precision from the graph.*teacher.precision=int8"):
            network_flags(ELEVEN, "int8")

    def test_what_the_builder_is_told(self, tmp_path: Path) -> None:
        cache = tmp_path / "timing.cache"
        cache.write_bytes(b"measured before")
        builder = Builder()
        options = BuildOptions(Profile(1, 32, 64), 224, precision="fp16", workspace_bytes=12345, timing_cache=cache)
        builder_config(TEN, builder, options)
        assert ("set_memory_pool_limit", "workspace", 12345) in builder.calls
        assert ("clear_flag", 7) in builder.calls
        assert ("set_flag", 0) in builder.calls
        assert ("set_shape", "images", (1, 224, 224, 3), (32, 224, 224, 3), (64, 224, 224, 3)) in builder.calls
        assert ("set_shape", "temperature", (1, 1), (32, 1), (64, 1)) in builder.calls
        assert ("create_timing_cache", b"measured before") in builder.calls
        assert [call[0] for call in builder.calls if call[0] == "add_optimization_profile"] == ["add_optimization_profile"]

    def test_the_graph_s_own_precision_sets_no_flag(self) -> None:
        builder = Builder()
        builder_config(ELEVEN, builder, OPTIONS)
        assert {"set_flag", "set_timing_cache"}.isdisjoint(call[0] for call in builder.calls)

    def test_without_tensorrt_one_line_says_so(self, stamped: tuple[Path, TeacherInfo], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "tensorrt", None)
        with pytest.raises(ConfigError, match=r"tensorrt cannot be imported here .*: pip install tensorrt"):
            build_plan(stamped[0], OPTIONS)
        with pytest.raises(StageMissing, match="does not exist"):
            build_plan(Path("nowhere.onnx"), OPTIONS)
        assert require_package("json", "") is json

    def test_cuda_errors_are_ours(self) -> None:
        cuda = SimpleNamespace(cudaError_t=SimpleNamespace(cudaSuccess=0))
        assert checked(cuda, (0, "value")) == "value"
        assert checked(cuda, (0,)) is None
        with pytest.raises(DistillError, match="CUDA: 2"):
            checked(cuda, (2, None))
        cuda.cudaGetDeviceProperties = lambda number: (0, SimpleNamespace(name=b"GPU 3000\0\0"))
        assert gpu_name(cuda) == "GPU 3000"


class PlayedEngine:
    """A `Runner`: the graph in ONNX Runtime, its logits moved by `shift` times the class id."""

    name = "model.plan"
    engine = "TensorRT 0"
    gives_soft_labels = True

    def __init__(self, source: Path, shift: float) -> None:
        self.graph, self.shift = OnnxRunner.of_file(source), shift

    def __call__(self, crops_BHWC: Any, temperature_B1: Any) -> Any:
        assert len(crops_BHWC) <= OPTIONS.profile.largest
        logits_BK, soft_labels_BK = self.graph(crops_BHWC, temperature_B1)
        return logits_BK + self.shift * np.arange(5), soft_labels_BK


class TestRepository:
    @pytest.fixture
    def served(self, stamped: tuple[Path, TeacherInfo], tmp_path: Path) -> tuple[Path, TeacherInfo]:
        path, info = stamped
        settings = RepositorySettings(max_batch_size=64, intra_op_threads=2)
        write_repository(tmp_path / "models", path, info.replace(version=3), settings)
        return tmp_path / "models", info.replace(version=3)

    def place(self, served: tuple[Path, TeacherInfo], crops: np.ndarray, shift: float = 0.0) -> Path:
        repository, info = served
        source = repository / "tiny" / "3" / "model.onnx"

        def open_engine(plan: bytes, name: str) -> Any:
            assert (plan, name) == (b"an engine", "model.plan")
            return PlayedEngine(source, shift)

        return place_engine(
            source,
            repository / "tiny-tensorrt",
            read_config(repository / "tiny"),
            info,
            OPTIONS,
            crops,
            [f"crop {row}" for row in range(len(crops))],
            failed=repository.parent / "failed",
            versions=("10.4.0", "GPU 3000"),
            build=lambda path, options: b"an engine",
            open_engine=open_engine,
        )

    def test_an_engine_stands_beside_its_teacher(self, served: tuple[Path, TeacherInfo], crops) -> None:
        folder = self.place(served, crops)
        repository, info = served
        assert folder == repository / "tiny-tensorrt" / "3"
        card = read_card(folder)
        assert card is not None
        assert (card.tensorrt, card.gpu, card.fingerprint) == ("10.4.0", "GPU 3000", info.fingerprint)
        assert card.source_sha256 == sha256_of(repository / "tiny" / "3" / "model.onnx")
        assert card.batch_sizes == (1, 32, 64)
        assert (folder / "model.plan").read_bytes() == b"an engine"
        assert json.loads((folder / "parity.json").read_text())["engine"] == "TensorRT 0"
        config = text_format.Parse((folder.parent / "config.pbtxt").read_text(), ModelConfig())
        assert (config.name, config.backend, config.default_model_filename) == ("tiny-tensorrt", "tensorrt", "model.plan")
        for warmup in config.model_warmup:
            assert (folder.parent / "warmup" / warmup.inputs["temperature"].input_data_file).is_file()
        (folder / "model.plan").write_bytes(b"another engine")
        assert read_card(folder) is None, "a card says nothing of an engine that it is not of"

    def test_an_engine_that_fails_the_gate_is_not_written(self, served: tuple[Path, TeacherInfo], crops) -> None:
        repository, _ = served
        before = sorted(repository.rglob("*"))
        with pytest.raises(ParityError, match=r"engine of .*model.onnx does not say"):
            self.place(served, crops, shift=1.0)
        assert sorted(repository.rglob("*")) == before
        report = json.loads((repository.parent / "failed" / "parity-failed.json").read_text())
        assert report["limits"] == PARITY_OF["fp32"].model_dump()
        assert len(list((repository.parent / "failed" / "worst").iterdir())) == 8

    def test_the_configuration_keeps_what_was_tuned(self, stamped: tuple[Path, TeacherInfo]) -> None:
        _, info = stamped
        settings = RepositorySettings(instance_kind="gpu", instance_count=2, acceleration="tensorrt", max_queue_delay_us=77)
        config = model_config(info, settings)
        plan = plan_config(config, info, "fast", 9)
        assert plan.input == config.input
        assert plan.output == config.output
        assert plan.dynamic_batching == config.dynamic_batching
        assert [(group.kind, group.count) for group in plan.instance_group] == [(ModelInstanceGroup.KIND_GPU, 2)]
        assert not plan.HasField("optimization")
        assert set(plan.parameters) == {METADATA_KEY}
        assert info_of(plan, "fast") == info.replace(name="fast", version=9)
        assert list(plan.version_policy.specific.versions) == [9]

    def test_the_file_says_who_it_is(self, stamped: tuple[Path, TeacherInfo], teacher_model: Path) -> None:
        path, info = stamped
        assert info_in(path) == info
        with pytest.raises(ConfigError, match=r"model.onnx is no teacher of ours"):
            info_in(teacher_model)

    def test_models_that_are_not_there_or_not_ours(self, tmp_path: Path) -> None:
        with pytest.raises(StageMissing, match=r"config.pbtxt does not exist"):
            read_config(tmp_path)
        (tmp_path / "config.pbtxt").write_text("nonsense: 1")
        with pytest.raises(ConfigError, match="no Triton model configuration"):
            read_config(tmp_path)
        with pytest.raises(ConfigError, match="'x' is no teacher of ours"):
            info_of(ModelConfig(), "x")


class TestProgram:
    ARGUMENTS = ("--repository", "models", "--model", "teacher", "--images", "photos/*.jpg")

    def test_arguments(self, capsys: pytest.CaptureFixture[str]) -> None:
        parsed = parse_arguments([*self.ARGUMENTS, "--workspace-mib", "100"])
        assert (parsed.repository, parsed.precision, parsed.workspace_mib) == (Path("models"), "graph", 100)
        for wrong in (self.ARGUMENTS[:4], (*self.ARGUMENTS, "--precision", "fp8"), (*self.ARGUMENTS, "--num-images", "0")):
            with pytest.raises(SystemExit) as caught:
                parse_arguments(wrong)
            assert caught.value.code == 2
        assert "--num-images is at least 1" in capsys.readouterr().err

    def test_it_runs_without_torch_and_onnx_and_says_what_is_missing(self) -> None:
        script = (
            "import sys\n"
            "for name in ('torch', 'onnx', 'timm', 'ray', 'fastapi', 'tensorrt'):\n"
            "    sys.modules[name] = None\n"
            f"from export.tensorrt import main; sys.exit(main({list(self.ARGUMENTS)!r}))"
        )
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, "")
        (line,) = done.stderr.strip().splitlines()
        assert line.startswith("error: tensorrt cannot be imported here")

    def test_the_whole_way_but_for_the_gpu(
        self, stamped: tuple[Path, TeacherInfo], crops, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An older version than the served one, with TensorRT and the engine played."""
        from export import tensorrt_model

        path, info = stamped
        repository = tmp_path / "models"
        for version in (1, 2):
            write_repository(repository, path, info.replace(version=version), RepositorySettings(max_batch_size=4))
        for row in range(6):
            Image.fromarray(crops[row]).save(tmp_path / f"{row}.png")
        asked: list[BuildOptions] = []

        def place(*arguments: Any, **named: Any) -> Path:
            asked.append(arguments[4])
            engine = PlayedEngine(arguments[0], 0.0)
            engine.gives_soft_labels = True
            return place_engine(*arguments, **named, build=lambda source, options: b"plan", open_engine=lambda plan, name: engine)

        monkeypatch.setattr(tensorrt_model, "place_engine", place)
        monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="11.4.0"))
        properties = SimpleNamespace(name="GPU 3000")
        cuda = SimpleNamespace(
            cudaError_t=SimpleNamespace(cudaSuccess=0), cudaGetDeviceProperties=lambda number: (0, properties)
        )  # fmt: skip
        for name in ("cuda", "cuda.bindings"):
            monkeypatch.setitem(sys.modules, name, SimpleNamespace(__path__=[]))
        monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)
        arguments = ["--repository", str(repository), "--model", "tiny", "--version", "1", "--images", str(tmp_path / "*.png")]
        assert main([*arguments, "--timing-cache", str(tmp_path / "cache"), "--workspace-mib", "7", "--num-images", "5"]) == 0
        assert asked == [BuildOptions(Profile(1, 4, 4), 16, "graph", 7 * 2**20, tmp_path / "cache")]
        card = read_card(repository / "tiny-tensorrt" / "1")
        assert card is not None
        assert (card.fingerprint, card.gpu, card.tensorrt) == (info.fingerprint, "GPU 3000", "11.4.0")
        assert json.loads((repository / "tiny-tensorrt" / "1" / "parity.json").read_text())["num_images"] == 5

    def test_errors_have_their_exit_code(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        from export import tensorrt_model

        def fail(parsed: Any) -> Path:
            raise ParityError("the engine is wrong")

        monkeypatch.setattr(tensorrt_model, "build_into_repository", fail)
        assert main(self.ARGUMENTS) == 2
        assert capsys.readouterr().err == "error: the engine is wrong\n"
