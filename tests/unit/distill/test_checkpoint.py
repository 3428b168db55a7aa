"""A checkpoint is whole or not there: crashes, damage, foreign weights and pickles."""

from __future__ import annotations

import json
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distill import checkpoint as module
from distill.checkpoint import (
    MANIFEST,
    STATE,
    WEIGHTS,
    file_sha256,
    load_checkpoint,
    load_weights,
    prepare_checkpoint,
    recover_folder,
    replace_folder,
    save_checkpoint,
)
from distill.errors import CheckpointError


def weights_of(value: float) -> dict[str, torch.Tensor]:
    return {"layer.weight": torch.full((3, 2), value), "layer.count": torch.tensor(7), "half": torch.ones(5, dtype=torch.float16)}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    save_checkpoint(folder, weights_of(1.5), {"kind": "test", "step": 3}, {"momentum": torch.arange(4.0), "names": ["a"], "rate": 0.1})
    return folder


def resign(folder: Path) -> None:
    """Give the manifest the checksums of what now lies there, as somebody who altered the files on purpose would."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"] = {name: file_sha256(folder / name) for name in manifest["files"]}
    (folder / MANIFEST).write_text(json.dumps(manifest))


class TestRoundTrip:
    def test_everything_comes_back(self, saved: Path) -> None:
        found = load_checkpoint(saved)
        assert found.weights.keys() == weights_of(0).keys()
        for name, tensor in weights_of(1.5).items():
            assert found.weights[name].dtype == tensor.dtype
            assert torch.equal(found.weights[name], tensor)
        assert (found.manifest["kind"], found.manifest["step"]) == ("test", 3)
        assert found.state is not None
        assert torch.equal(found.state["momentum"], torch.arange(4.0))
        assert (found.state["names"], found.state["rate"]) == (["a"], 0.1)

    def test_without_state(self, tmp_path: Path) -> None:
        save_checkpoint(tmp_path / "c", weights_of(1), {})
        assert load_checkpoint(tmp_path / "c").state is None
        assert sorted(path.name for path in (tmp_path / "c").iterdir()) == [MANIFEST, WEIGHTS]

    def test_views_are_saved_as_their_own_memory(self, tmp_path: Path) -> None:
        base = torch.arange(6.0).reshape(2, 3)
        save_checkpoint(tmp_path / "c", {"turned": base.T}, {})
        assert torch.equal(load_checkpoint(tmp_path / "c").weights["turned"], base.T)

    def test_tied_weights_are_saved_under_each_of_their_names(self, tmp_path: Path) -> None:
        layer = nn.Linear(2, 2, bias=False)
        save_checkpoint(tmp_path / "c", {"one": layer.weight, "part": layer.weight[0], "other": layer.weight}, {})
        found = load_checkpoint(tmp_path / "c").weights
        assert torch.equal(found["one"], layer.weight)
        assert torch.equal(found["other"], layer.weight)
        assert torch.equal(found["part"], layer.weight[0])

    def test_overwriting_leaves_nothing_behind(self, saved: Path) -> None:
        save_checkpoint(saved, weights_of(2.5), {"kind": "test", "step": 4})
        found = load_checkpoint(saved)
        assert (found.manifest["step"], found.state) == (4, None)
        assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_what_is_prepared_does_not_change_any_more(tmp_path: Path) -> None:
    """The loop goes on with the same tensors and lists while they are written."""
    weights, rows = weights_of(1.5), [{"step": 1}]
    state = {"momentum": torch.arange(4.0), "groups": [{"lr": 0.1, "betas": (0.9, torch.tensor(0.5))}]}
    write = prepare_checkpoint(weights, {"rows": rows}, state)
    weights["layer.weight"].add_(1)
    rows.append({"step": 2})
    state["momentum"].mul_(0)
    state["groups"][0]["lr"] = 7
    write(tmp_path / "c")
    found = load_checkpoint(tmp_path / "c")
    assert torch.equal(found.weights["layer.weight"], weights_of(1.5)["layer.weight"])
    assert found.manifest["rows"] == [{"step": 1}]
    assert found.state is not None
    assert torch.equal(found.state["momentum"], torch.arange(4.0))
    assert found.state["groups"] == [{"lr": 0.1, "betas": (0.9, torch.tensor(0.5))}]


class TestCrash:
    @pytest.mark.parametrize("fails_at", [1, 2])
    def test_between_the_renames(self, saved: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int) -> None:
        """The old checkpoint is moved aside, then the new one moved in; the process dies before one of the two."""
        renames = 0
        rename = Path.rename

        def dying(self: Path, target: Path) -> Path:
            nonlocal renames
            renames += 1
            if renames == fails_at:
                raise KeyboardInterrupt
            return rename(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", dying)
            with pytest.raises(KeyboardInterrupt):
                save_checkpoint(saved, weights_of(2.5), {"step": 4})
        assert saved.exists() == (fails_at == 1)
        assert load_checkpoint(saved).manifest["step"] == 3
        save_checkpoint(saved, weights_of(2.5), {"step": 4})
        assert load_checkpoint(saved).manifest["step"] == 4
        assert [path.name for path in saved.parent.iterdir()] == [saved.name]

    def test_while_writing(self, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def dying(state: Any, path: Path) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(torch, "save", dying)
            with pytest.raises(KeyboardInterrupt):
                save_checkpoint(saved, weights_of(2.5), {"step": 4}, {"a": 1})
        assert load_checkpoint(saved).manifest["step"] == 3

    def test_what_a_killed_process_left_goes_with_the_next_save(self, saved: Path) -> None:
        code = f"""
import os, signal, torch
from pathlib import Path
from distill import checkpoint
checkpoint.replace_folder = lambda pending, folder: os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save_checkpoint(Path({str(saved)!r}), {{"a": torch.zeros(1)}}, {{"step": 9}})
"""
        assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
        assert len(list(saved.parent.iterdir())) == 2
        save_checkpoint(saved, weights_of(2.5), {"step": 4})
        assert load_checkpoint(saved).manifest["step"] == 4
        assert [path.name for path in saved.parent.iterdir()] == [saved.name]

    def test_recover_prefers_the_new_one(self, tmp_path: Path) -> None:
        """Cut off after the second rename: the new folder is there, the old one not yet removed."""
        for name, text in (("thing", "new"), (".thing.old", "old")):
            (tmp_path / name).mkdir()
            (tmp_path / name / "x").write_text(text)
        recover_folder(tmp_path / "thing")
        assert (tmp_path / "thing" / "x").read_text() == "new"
        (tmp_path / "next").mkdir()
        (tmp_path / "next" / "x").write_text("newer")
        replace_folder(tmp_path / "next", tmp_path / "thing")
        assert (tmp_path / "thing" / "x").read_text() == "newer"
        assert [path.name for path in tmp_path.iterdir()] == ["thing"]

    def test_everything_is_synced_before_the_rename(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        events: list[str] = []
        rename, sync = Path.rename, module.fsync_path

        def noted_rename(self: Path, target: Path) -> Path:
            events.append("rename")
            return rename(self, target)

        def noted_sync(path: Path) -> None:
            events.append(path.name)
            sync(path)

        monkeypatch.setattr(Path, "rename", noted_rename)
        monkeypatch.setattr(module, "fsync_path", noted_sync)
        save_checkpoint(tmp_path / "c", weights_of(1), {}, {})
        assert set(events[: events.index("rename")]) >= {WEIGHTS, STATE, MANIFEST}
        assert events[-1] == tmp_path.name


class TestDamage:
    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"no checkpoint in .*nowhere"):
            load_checkpoint(tmp_path / "nowhere")
        (tmp_path / "file").write_text("x")
        with pytest.raises(CheckpointError, match="no checkpoint in"):
            load_checkpoint(tmp_path / "file")

    @pytest.mark.parametrize("name", [WEIGHTS, STATE, MANIFEST])
    def test_a_file_is_gone(self, saved: Path, name: str) -> None:
        (saved / name).unlink()
        with pytest.raises(CheckpointError, match=f"{name} is missing"):
            load_checkpoint(saved)

    @pytest.mark.parametrize("name", [WEIGHTS, STATE])
    @pytest.mark.parametrize("damage", ["truncated", "one bit", "empty"])
    def test_a_file_is_damaged(self, saved: Path, name: str, damage: str) -> None:
        data = bytearray((saved / name).read_bytes())
        if damage == "one bit":
            data[-3] ^= 1
        (saved / name).write_bytes(data if damage == "one bit" else data[: 0 if damage == "empty" else -5])
        with pytest.raises(CheckpointError, match=f"{name} is truncated or altered"):
            load_checkpoint(saved)

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"files": 3}', b"\xff\xfe\x9d", b'{"files": {}}'])
    def test_the_manifest_is_damaged(self, saved: Path, content: bytes) -> None:
        (saved / MANIFEST).write_bytes(content)
        with pytest.raises(CheckpointError, match="damaged"):
            load_checkpoint(saved)

    @pytest.mark.parametrize("name", [WEIGHTS, STATE])
    def test_a_right_checksum_of_garbage(self, saved: Path, name: str) -> None:
        (saved / name).write_bytes(b"garbage" * 40)
        resign(saved)
        with pytest.raises(CheckpointError, match="damaged"):
            load_checkpoint(saved)


class Attack:
    """Unpickled, it would write a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


class TestPickle:
    @pytest.mark.parametrize("writer", ["torch.save", "plain pickle"])
    def test_is_never_executed(self, saved: Path, tmp_path: Path, writer: str) -> None:
        target = tmp_path / "pwned"
        if writer == "torch.save":
            torch.save({"optimizer": Attack(target)}, saved / STATE)
        else:
            (saved / STATE).write_bytes(pickle.dumps({"optimizer": Attack(target)}, protocol=2))
        resign(saved)
        with pytest.raises(CheckpointError, match="damaged"):
            load_checkpoint(saved)
        assert not target.exists()
        # The attack is a real one: whoever unpickles it is hit.
        pickle.loads(pickle.dumps(Attack(target)))
        assert target.exists()


class TestLoadWeights:
    def network(self) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))

    def test_fits(self) -> None:
        source, target = self.network(), self.network()
        load_weights(target, source.state_dict(), "x")
        for mine, theirs in zip(target.parameters(), source.parameters(), strict=True):
            assert torch.equal(mine, theirs)

    def test_names_what_does_not(self) -> None:
        weights = self.network().state_dict()
        weights["1.extra"] = weights.pop("1.bias")
        weights["0.weight"] = torch.zeros(3, 2)
        network = self.network()
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        with pytest.raises(CheckpointError) as caught:
            load_weights(network, weights, "runs/x/checkpoint")
        said = "runs/x/checkpoint belongs to another network (missing: 1.bias; left over: 1.extra; other shape: 0.weight)"
        assert str(caught.value) == said
        assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())

    def test_a_long_list_is_cut(self) -> None:
        with pytest.raises(CheckpointError, match=r"left over: k10, k11, .*, k28, k29 \.\.\. \(30 in all\)\)"):
            load_weights(nn.Identity(), {f"k{i}": torch.zeros(1) for i in range(10, 40)}, "x")
