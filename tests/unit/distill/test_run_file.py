"""The run file itself: the recipes load, what is loaded writes down and loads again the same, and its documentation is its classes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.cli.fields import run_file_markdown, section_fields
from distill.cli.run_file import RunFile, read_run_file
from distill.config import Section, section_in
from distill.errors import ConfigError

ROOT = Path(__file__).parents[3]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))

SMALLEST: dict[str, Any] = {
    "run_dir": "runs/x",
    "data": {name: {"path": "images"} for name in ("unlabelled", "labelled", "test")},
    "train": {"students": [{"name": "small", "network": {"depth": 10}}]},
}


def write(path: Path, tree: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def leaves(kind: type[Section], path: str = "") -> Iterator[str]:
    """The keys of every single setting, found without the code under test."""
    for name, field in kind.model_fields.items():
        key = f"{path}{field.alias or name}"
        nested = section_in(field.annotation)
        if nested is None:
            yield key
        else:
            yield from leaves(nested, f"{key}.N." if str(field.annotation).startswith("list") else f"{key}.")


class TestRunFile:
    @pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
    def test_recipes_load(self, path: Path) -> None:
        file = read_run_file(path, [])
        assert file.train.students
        for images in (file.data.unlabelled, file.data.labelled, file.data.test):
            if images.path.startswith("data/"):  # what ships with the project; other images are the reader's to bring
                assert list(ROOT.glob(images.path)), f"{path.name}: nothing at {images.path}"

    def test_there_are_recipes(self) -> None:
        assert ROOT / "recipes" / "quickstart.yaml" in RECIPES

    @pytest.mark.parametrize("by_alias", [True, False])
    def test_round_trip(self, tmp_path: Path, by_alias: bool) -> None:
        tree = {**SMALLEST, "import": {"kind": "onnx", "path": "teacher.onnx"}, "store": {"temperatures": [1.0, 4.0]}}
        file = read_run_file(write(tmp_path / "run.yaml", tree), ["train.students.0.optimizer.learning_rate=1e-3"])
        again = read_run_file(write(tmp_path / "again.yaml", file.model_dump(mode="json", by_alias=by_alias)), [])
        assert again == file
        assert again.digest() == file.digest()

    def test_the_smallest_one(self, tmp_path: Path) -> None:
        file = read_run_file(write(tmp_path / "run.yaml", SMALLEST), [])
        assert (file.seed, file.import_, file.train.students[0].name) == (0, None, "small")

    @pytest.mark.parametrize("missing", ["run_dir", "data", "train"])
    def test_what_is_required_is_named(self, tmp_path: Path, missing: str) -> None:
        path = write(tmp_path / "run.yaml", {key: value for key, value in SMALLEST.items() if key != missing})
        with pytest.raises(ConfigError, match=f"run.yaml: {missing}: Field required"):
            read_run_file(path, [])

    @pytest.mark.parametrize(
        ("override", "said"),
        [
            ("import.tim_name=x", "import.tim_name: unknown key; did you mean 'timm_name'?"),
            (
                "pretrain.global_batch=1",
                "pretrain.global_batch: a batch of one image has no negatives; give at least 2 (given: 1)",
            ),
            ("train.students.0.network.depth=17", "depth is one of 10, 14, 18, 26, 34, 50, 101, 152, 200 (given: 17)"),
            ("train.students.0.name=a/b", "(given: 'a/b')"),
            ("store.temperatures=[1, 0]", "store.temperatures.1: Input should be greater than 0 (given: 0)"),
            ("store.temperatures=[-1]", "store.temperatures.0: Input should be greater than 0 (given: -1)"),
            ("data.label_fraction=0", "data.label_fraction: Input should be greater than 0 (given: 0)"),
            ("seed=-1", "seed: Input should be greater than or equal to 0 (given: -1)"),
        ],
    )
    def test_refused_in_one_line(self, tmp_path: Path, override: str, said: str) -> None:
        path = write(tmp_path / "run.yaml", {**SMALLEST, "import": {"kind": "onnx", "path": "x"}})
        with pytest.raises(ConfigError) as caught:
            read_run_file(path, [override])
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("overrides", "said"),
        [
            (["finetune.num_head_layers=3"], "finetune.num_head_layers 3 must be below pretrain.num_head_layers 3: the last layer"),
            (
                ["pretrain.network.name=timm:resnet18"],
                "pretrain.network.name 'timm:resnet18': only our own networks (resnet) are pretrained",
            ),
        ],
    )
    def test_stages_that_do_not_fit_each_other(self, tmp_path: Path, overrides: list[str], said: str) -> None:
        """Each alone is right; a worker would find out, the first of them after all of pretraining."""
        with pytest.raises(ConfigError) as caught:
            read_run_file(write(tmp_path / "run.yaml", SMALLEST), overrides)
        assert f"run.yaml: {said}" in str(caught.value)
        read_run_file(write(tmp_path / "run.yaml", {**SMALLEST, "import": {"kind": "onnx", "path": "x"}}), overrides)

    def test_two_students_of_one_name(self, tmp_path: Path) -> None:
        tree = {**SMALLEST, "train": {"students": 2 * SMALLEST["train"]["students"]}}
        with pytest.raises(ConfigError, match="every student needs a name of its own"):
            read_run_file(write(tmp_path / "run.yaml", tree), [])


class TestDocumentation:
    def test_every_setting_is_explained(self) -> None:
        text = run_file_markdown()
        for key in leaves(RunFile):
            assert f"| `{key}` |" in text, key
        sections = [field.alias or name for name, field in RunFile.model_fields.items() if section_in(field.annotation)]
        for name in sections:
            for key, _, meaning in section_fields(name):
                assert meaning, f"{key} has no docstring"

    def test_defaults_are_the_ones_that_a_run_gets(self) -> None:
        """A section may give its part another default than the part's own class: pretraining's network is a ResNet-50."""
        text = run_file_markdown()
        assert "| `pretrain.network.depth` | `50` |" in text
        assert "| `train.students.N.network.depth` | `18` |" in text
        assert "| `run_dir` | (required) |" in text

    def test_defaults_hold_beside_an_override(self, tmp_path: Path) -> None:
        path = write(tmp_path / "run.yaml", SMALLEST)
        file = read_run_file(path, ["pretrain.network.stem=cifar", "finetune.optimizer.learning_rate=0.01"])
        assert (file.pretrain.network.depth, file.pretrain.network.sk_ratio) == (50, 0.0625)
        assert (file.finetune.optimizer.weight_decay, file.finetune.optimizer.warmup_share) == (0.0, 0.0)

    def test_docs_are_up_to_date(self) -> None:
        written = (ROOT / "docs" / "run_file.md").read_text(encoding="utf-8")
        assert written == run_file_markdown(), "docs/run_file.md is out of date: python -m distill.cli.fields > docs/run_file.md"
