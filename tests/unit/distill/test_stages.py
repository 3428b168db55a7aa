"""A finished stage is not done twice; one with other settings is moved aside, and whoever needs it is told what differs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from distill.config import Section
from distill.errors import ConfigError, StageMissing
from distill.stages import RECORD, WANTED, Stage, difference, plain, prepare_run_dir


def stage_of(run_dir: Path, epochs: int = 3, images: str = "aaaa", **settings: Any) -> Stage:
    return Stage(run_dir, "pretrain", {"pretrain": {"epochs": epochs, "network": {"depth": 18}}, **settings}, {"images": images})


def finish(stage: Stage, **result: Any) -> None:
    (stage.begin() / "product").write_text(stage.digest)
    stage.finish(result)


class TestReuse:
    def test_same_settings(self, tmp_path: Path) -> None:
        assert stage_of(tmp_path).result() is None
        finish(stage_of(tmp_path), loss=0.5, curve=[1, 2])
        assert stage_of(tmp_path).result() == {"loss": 0.5, "curve": [1, 2]} == stage_of(tmp_path).require()

    def test_an_empty_result_is_a_result(self, tmp_path: Path) -> None:
        finish(stage_of(tmp_path))
        assert stage_of(tmp_path).require() == {}

    @pytest.mark.parametrize("changed", [{"epochs": 4}, {"images": "bbbb"}, {"seed": 1}])
    def test_redone_with_others(self, tmp_path: Path, changed: dict[str, Any]) -> None:
        first, second = stage_of(tmp_path), stage_of(tmp_path, **changed)
        finish(first, loss=1)
        assert first.digest != second.digest
        assert second.result() is None
        finish(second, loss=2)
        assert (second.result(), first.result()) == ({"loss": 2}, None)
        (old,) = (tmp_path / "old").iterdir()
        assert old.name.startswith("pretrain-")
        assert (old / "product").read_text() == first.digest
        assert json.loads((old / RECORD).read_text())["result"] == {"loss": 1}

    def test_nothing_old_is_overwritten(self, tmp_path: Path) -> None:
        """Several in one second: every one is kept."""
        for epochs in range(1, 6):
            finish(stage_of(tmp_path, epochs))
        products = {path.read_text() for path in (tmp_path / "old").glob("*/product")}
        assert products == {stage_of(tmp_path, epochs).digest for epochs in range(1, 5)}

    def test_forget(self, tmp_path: Path) -> None:
        stage = stage_of(tmp_path)
        stage.forget()
        finish(stage)
        stage.forget()
        assert stage.result() is None
        assert len(list((tmp_path / "old").iterdir())) == 1

    def test_digest_ignores_the_order_of_settings(self, tmp_path: Path) -> None:
        one = Stage(tmp_path, "x", {"a": 1, "b": 2}, {})
        assert one.digest == Stage(tmp_path / "elsewhere", "x", {"b": 2, "a": 1}, {}).digest
        assert one.digest != Stage(tmp_path, "x", {"a": 1, "b": "2"}, {}).digest


class TestUnfinished:
    def test_work_in_progress_is_kept(self, tmp_path: Path) -> None:
        (stage_of(tmp_path).begin() / "checkpoint").write_text("step 7")
        assert stage_of(tmp_path).result() is None
        assert (stage_of(tmp_path).begin() / "checkpoint").read_text() == "step 7"
        assert not (tmp_path / "old").exists()

    def test_work_in_progress_of_other_settings_is_moved(self, tmp_path: Path) -> None:
        (stage_of(tmp_path).begin() / "checkpoint").write_text("step 7")
        folder = stage_of(tmp_path, epochs=9).begin()
        assert [path.name for path in folder.iterdir()] == [WANTED]
        assert next((tmp_path / "old").glob("*/checkpoint")).read_text() == "step 7"

    def test_what_nobody_signed_is_moved(self, tmp_path: Path) -> None:
        (tmp_path / "pretrain").mkdir()
        (tmp_path / "pretrain" / "mine").write_text("precious")
        assert not (stage_of(tmp_path).begin() / "mine").exists()
        assert next((tmp_path / "old").glob("*/mine")).read_text() == "precious"

    @pytest.mark.parametrize("kept_bytes", [0, 1, 40])
    def test_a_torn_record(self, tmp_path: Path, kept_bytes: int) -> None:
        stage = stage_of(tmp_path)
        finish(stage, loss=1)
        record = stage.folder / RECORD
        record.write_bytes(record.read_bytes()[:kept_bytes])
        assert stage.result() is None
        with pytest.raises(StageMissing, match="not finished"):
            stage.require()

    def test_a_zeroed_record(self, tmp_path: Path) -> None:
        """What some file systems leave after a power cut."""
        stage = stage_of(tmp_path)
        finish(stage)
        (stage.folder / RECORD).write_bytes(bytes(200))
        assert stage.result() is None

    def test_the_record_is_renamed_into_place(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def dying(self: Path, target: Path) -> Path:
            raise KeyboardInterrupt

        stage = stage_of(tmp_path)
        folder = stage.begin()
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", dying)
            with pytest.raises(KeyboardInterrupt):
                stage.finish({"loss": 1})
        assert stage.result() is None
        (folder / "checkpoint").write_text("kept")
        assert (stage.begin() / "checkpoint").read_text() == "kept"

    def test_begin_on_a_finished_one_takes_the_mark_off(self, tmp_path: Path) -> None:
        """Cut off in the middle of doing it again, it must not look finished."""
        stage = stage_of(tmp_path)
        finish(stage)
        stage.begin()
        assert stage.result() is None


class TestRequire:
    def test_not_there_names_the_verb(self, tmp_path: Path) -> None:
        with pytest.raises(StageMissing, match=r"pretrain is not finished; run `distill pretrain` with this run file first"):
            stage_of(tmp_path).require()

    @pytest.mark.parametrize(
        ("changed", "said"),
        [
            ({"epochs": 4}, "(pretrain.epochs: 3, now 4)"),
            ({"images": "bbbb"}, "(input.images: aaaa, now bbbb)"),
            ({"seed": 1}, "(seed: None, now 1)"),
        ],
    )
    def test_other_settings_are_named(self, tmp_path: Path, changed: dict[str, Any], said: str) -> None:
        finish(stage_of(tmp_path))
        with pytest.raises(StageMissing) as caught:
            stage_of(tmp_path, **changed).require()
        assert said in str(caught.value)
        assert "run `distill pretrain` again" in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_inside_a_list(self, tmp_path: Path) -> None:
        students = [{"name": name, "optimizer": {"name": "sgd", "learning_rate": 0.1}} for name in ("first", "second")]
        finish(stage_of(tmp_path, students=students))
        changed = [students[0], {**students[1], "optimizer": {"name": "sgd", "learning_rate": 0.2}}]
        with pytest.raises(StageMissing, match=r"\(students\.1\.optimizer\.learning_rate: 0\.1, now 0\.2\)"):
            stage_of(tmp_path, students=changed).require()

    def test_many_differences_are_cut(self) -> None:
        found, now = ({"settings": {f"k{i}": value for i in range(9)}, "inputs": {}} for value in (0, 1))
        assert difference(found, now) == "k0: 0, now 1; k1: 0, now 1; k2: 0, now 1; ..."
        assert difference(found, found) == ""
        long = {"settings": {"digest": "f" * 64}, "inputs": {}}
        assert difference(long, {"settings": {"digest": "e" * 64}, "inputs": {}}) == f"digest: {'f' * 12}..., now {'e' * 12}..."


class TestRunDir:
    def test_made_with_its_parents(self, tmp_path: Path) -> None:
        prepare_run_dir(tmp_path / "a" / "b")
        prepare_run_dir(tmp_path / "a" / "b")
        assert (tmp_path / "a" / "b").is_dir()

    def test_in_the_way(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("x")
        for path in (tmp_path / "file", tmp_path / "file" / "below"):
            with pytest.raises(ConfigError, match="cannot be made"):
                prepare_run_dir(path)

    def test_not_writable(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
        with pytest.raises(ConfigError, match="is not writable; choose another with run_dir=PATH"):
            prepare_run_dir(tmp_path)


def test_plain_is_json(tmp_path: Path) -> None:
    class Some(Section):
        """Some settings."""

        sizes: tuple[int, ...] = (1, 2)
        """Sizes."""
        path: Path = Path("x")
        """A path."""

    stage = Stage(tmp_path, "some", plain(Some()), {})
    finish(stage, fine=True)
    assert stage.require() == {"fine": True}
