"""Run files and overrides: what is right becomes typed settings, what is wrong becomes one line that names it and the way out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import ConfigDict, Field, ValidationError

from distill.config import Section, digest_of, load_run_file, section_in, validate, with_overrides
from distill.errors import ConfigError


class Optimizer(Section):
    """An optimiser."""

    name: Literal["sgd", "adamw"] = "sgd"
    """Which."""
    learning_rate: float = Field(default=0.1, gt=0)
    """Rate."""


class Student(Section):
    """One of several."""

    name: str
    """Its name."""
    optimizer: Optimizer = Optimizer()
    """Its optimiser."""


class Elsewhere(Section):
    """Optional."""

    path: str
    """Where."""


class Gentle(Section):
    """Gives its part other defaults than the part's own class."""

    optimizer: Optimizer = Optimizer(name="adamw", learning_rate=0.5)
    """Another default."""


class Outer(Section):
    """And another, one level up."""

    gentle: Gentle = Gentle(optimizer=Optimizer(learning_rate=7))
    """Another default."""


class Settings(Section):
    """A run file in small."""

    model_config = ConfigDict(**{**Section.model_config, "populate_by_name": True})

    epochs: int = Field(default=3, ge=1, le=100)
    """Passes."""
    students: list[Student] = Field(default_factory=list)
    """All of them."""
    import_: Elsewhere | None = Field(default=None, alias="import")
    """A Python keyword as a key."""


def refusal(tree: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(Settings, tree, origin="run.yaml")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("run.yaml: ")
    return message


class TestRefusals:
    @pytest.mark.parametrize(
        ("tree", "where", "nearest"),
        [
            ({"epoch": 3}, "epoch", "'epochs'"),
            ({"studens": []}, "studens", "'students'"),
            ({"students": [{"name": "a"}, {"name": "b", "optimiser": {}}]}, "students.1.optimiser", "'optimizer'"),
            ({"students": [{"name": "a", "optimizer": {"learningrate": 1}}]}, "students.0.optimizer.learningrate", "'learning_rate'"),
            ({"improt": {}}, "improt", "'import'"),
            ({"import": {"path": "x", "pth": "y"}}, "import.pth", "'path'"),
        ],
    )
    def test_unknown_key_names_the_nearest(self, tree: dict[str, Any], where: str, nearest: str) -> None:
        assert f"{where}: unknown key; did you mean {nearest}?" in refusal(tree)

    def test_unknown_key_without_a_near_one_lists_all(self) -> None:
        assert refusal({"zzzz": 1}).endswith("zzzz: unknown key; known are: epochs, import, students")

    @pytest.mark.parametrize("value", [0, 101, -7])
    def test_out_of_range_names_value_and_limit(self, value: int) -> None:
        message = refusal({"epochs": value})
        assert "epochs: " in message
        assert f"(given: {value})" in message
        assert ("1" if value < 1 else "100") in message.partition("(given")[0]

    def test_wrong_type_names_path_and_value(self) -> None:
        assert "(given: 'many')" in refusal({"epochs": "many"})
        assert "students.0.optimizer.name" in refusal({"students": [{"name": "a", "optimizer": {"name": "lars"}}]})

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_not_finite(self, value: float) -> None:
        assert "learning_rate" in refusal({"students": [{"name": "a", "optimizer": {"learning_rate": value}}]})

    def test_several_at_once(self) -> None:
        message = refusal({"epochs": 0, "studens": []})
        assert "epochs: " in message
        assert "studens: " in message

    @pytest.mark.parametrize("text", ["", "- a\n", "just words", "a: [1\n", "a: {b: 1\n"])
    def test_no_mapping_or_no_yaml(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"run\.yaml") as caught:
            load_run_file(Settings, path, [])
        assert "\n" not in str(caught.value)

    def test_unreadable(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"does not exist; give one with --config"):
            load_run_file(Settings, tmp_path / "run.yaml", [])
        with pytest.raises(ConfigError, match="cannot be read"):
            load_run_file(Settings, tmp_path, [])
        (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00\x9d")
        with pytest.raises(ConfigError, match="cannot be read"):
            load_run_file(Settings, tmp_path / "bytes.yaml", [])


class TestOverrides:
    def tree(self) -> dict[str, Any]:
        return {"epochs": 3, "empty": None, "students": [{"name": "a"}, {"name": "b", "optimizer": {"learning_rate": 1.0}}]}

    @pytest.mark.parametrize(
        ("word", "path", "value"),
        [
            ("epochs=7", ("epochs",), 7),
            ("students.1.name=c", ("students", 1, "name"), "c"),
            ("students.0.optimizer.learning_rate=0.5", ("students", 0, "optimizer", "learning_rate"), 0.5),
            ("students.1.optimizer={name: adamw}", ("students", 1, "optimizer"), {"name": "adamw"}),
            ("new.deep.path=[1, 2]", ("new", "deep", "path"), [1, 2]),
            ("empty.key=1", ("empty", "key"), 1),
            ("a=x=y", ("a",), "x=y"),
            ("a=", ("a",), None),
            ("a=null", ("a",), None),
            ("a=true", ("a",), True),
            ("a='007'", ("a",), "007"),
        ],
    )
    def test_forms(self, word: str, path: tuple[str | int, ...], value: Any) -> None:
        found: Any = with_overrides(self.tree(), [word])
        for key in path:
            found = found[key]
        assert found == value
        assert type(found) is type(value)

    def test_the_last_one_wins_and_the_rest_stays(self) -> None:
        assert with_overrides(self.tree(), ["epochs=4", "epochs=5"]) == {**self.tree(), "epochs": 5}

    @pytest.mark.parametrize(
        ("word", "said"),
        [
            ("epochs", "not of the form section.key=value"),
            ("=3", "not of the form section.key=value"),
            ("", "not of the form section.key=value"),
            ("students.2.name=c", "'2' is not one of the positions 0 to 1"),
            ("students.first.name=c", "'first' is not one of the positions 0 to 1"),
            ("students.-1.name=c", "'-1' is not one of the positions 0 to 1"),
            ("students.².name=c", "'²' is not one of the positions 0 to 1"),
            ("epochs.more=1", "epochs has no keys"),
            ("epochs=[1", "the value is not YAML"),
            ("epochs={", "the value is not YAML"),
        ],
    )
    def test_refused(self, word: str, said: str) -> None:
        with pytest.raises(ConfigError) as caught:
            with_overrides(self.tree(), [word])
        assert said in str(caught.value)
        assert repr(word) in str(caught.value)

    def test_scientific_notation_reaches_a_float(self, tmp_path: Path) -> None:
        """YAML 1.1 reads 1e-4 as a word; the field makes it a number."""
        path = tmp_path / "run.yaml"
        path.write_text("students: [{name: a}]")
        settings = load_run_file(Settings, path, ["students.0.optimizer.learning_rate=1e-4"])
        assert settings.students[0].optimizer.learning_rate == 1e-4


class TestSections:
    def test_frozen(self) -> None:
        with pytest.raises(ValidationError, match="frozen"):
            Settings().epochs = 5  # type: ignore[misc]

    def test_replace_validates_and_keeps_the_rest(self) -> None:
        settings = Settings.model_validate({"epochs": 4, "import": {"path": "x"}})
        changed = settings.replace(epochs=5)
        assert (changed.epochs, changed.import_) == (5, Elsewhere(path="x"))
        assert settings.epochs == 4
        with pytest.raises(ValidationError):
            settings.replace(epochs=0)
        with pytest.raises(ValidationError):
            settings.replace(unknown=0)

    def test_a_section_given_in_part_keeps_the_documented_defaults(self) -> None:
        assert Gentle.model_validate({"optimizer": {"name": "sgd"}}).optimizer == Optimizer(name="sgd", learning_rate=0.5)
        assert Gentle.model_validate({"optimizer": {"learning_rate": 2}}).optimizer == Optimizer(name="adamw", learning_rate=2)
        assert Outer.model_validate({"gentle": {"optimizer": {"name": "adamw"}}}).gentle.optimizer == Optimizer(
            name="adamw", learning_rate=7
        )
        assert Outer.model_validate({"gentle": {}}) == Outer()
        with pytest.raises(ConfigError, match=r"x: gentle\.optimizer\.nam: unknown key; did you mean 'name'"):
            validate(Outer, {"gentle": {"optimizer": {"nam": 1}}}, origin="x")

    def test_help_is_the_docstring(self) -> None:
        assert Settings.model_fields["epochs"].description == "Passes."

    @pytest.mark.parametrize(
        ("annotation", "expected"),
        [(Student, Student), (list[Student], Student), (Elsewhere | None, Elsewhere), (dict[str, int], None), (int, None)],
    )
    def test_section_in(self, annotation: Any, expected: Any) -> None:
        assert section_in(annotation) is expected

    def test_digest_tells_settings_apart(self) -> None:
        assert Settings().digest() == Settings(epochs=3).digest()
        assert len({Settings().digest(), Settings(epochs=4).digest(), Settings().digest(seed=1), Settings().digest(seed=2)}) == 4

    def test_digest_does_not_depend_on_order_or_process(self) -> None:
        assert digest_of({"b": [1, 2], "a": None}) == digest_of({"a": None, "b": [1, 2]})
        assert digest_of({"a": [1, 2]}) != digest_of({"a": [2, 1]})
        code = "from distill.config import digest_of; print(digest_of({'b': [1, 2], 'a': {'ü', }.pop()}))"
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7"})
        assert other.stdout.strip() == digest_of({"a": "ü", "b": [1, 2]})
