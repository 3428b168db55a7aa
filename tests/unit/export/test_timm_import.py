"""Weights files of others, and networks of timm: made, described, loaded from local files only."""

import argparse
import logging
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from distill.errors import CheckpointError, ConfigError
from distill.models.saved_classifier import load_classifier
from distill.models.timm_networks import create_timm, import_timm_library, repair_torchvision
from distill.models.weight_files import fit_weights, read_weights
from distill.teacher_info import Preprocessing
from export.settings import StatedPreprocessing
from export.torch_imports import import_timm, import_torch

NAME = "mobilenetv3_small_050"
CLASSES = ("a", "b", "c")


class Opaque:
    """Something that only pickle could load."""


PLAIN = {"a": torch.arange(6.0), "b": torch.ones(2)}
AVERAGED = {name: tensor + 1 for name, tensor in PLAIN.items()}


def prefixed(prefix: str, weights: dict[str, Tensor] = PLAIN) -> dict[str, Tensor]:
    return OrderedDict((prefix + name, tensor) for name, tensor in weights.items())


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor)


class TestWeightsFiles:
    def test_safetensors(self, tmp_path: Path) -> None:
        save_file(prefixed("module."), tmp_path / "w.safetensors")
        assert_same(read_weights(tmp_path / "w.safetensors"), PLAIN)

    @pytest.mark.parametrize(
        "tree",
        [
            PLAIN,
            {"epoch": 3, "state_dict": prefixed("module.")},
            {"model": PLAIN, "optimizer": {"state": {}}, "ema": 0.999},
            {"model": {"state_dict": prefixed("_orig_mod.module.")}},
            {"model_state_dict": prefixed("module._orig_mod.")},
            {"state_dict": prefixed("model."), "pytorch-lightning_version": "2"},
        ],
    )
    def test_wrappings(self, tmp_path: Path, tree: Any) -> None:
        torch.save(tree, tmp_path / "w.pth")
        assert_same(read_weights(tmp_path / "w.pth"), PLAIN)

    def test_a_prefix_of_some_names_is_part_of_them(self, tmp_path: Path) -> None:
        mixed = {"module.a": torch.ones(1), "b": torch.ones(1)}
        torch.save(mixed, tmp_path / "w.pth")
        assert_same(read_weights(tmp_path / "w.pth"), mixed)

    @pytest.mark.parametrize("key", ["state_dict_ema", "model_ema", "ema"])
    def test_averaged_weights_are_taken_when_asked_for(self, tmp_path: Path, key: str, caplog: pytest.LogCaptureFixture) -> None:
        torch.save({"state_dict": PLAIN, key: prefixed("module.", AVERAGED)}, tmp_path / "w.pth")
        assert_same(read_weights(tmp_path / "w.pth", use_ema=True), AVERAGED)
        assert not caplog.records
        with caplog.at_level(logging.WARNING):
            assert_same(read_weights(tmp_path / "w.pth"), PLAIN)
        assert f"also holds averaged weights ({key}), left out" in caplog.text

    def test_averaged_weights_are_neither_made_up_nor_taken_unasked(self, tmp_path: Path) -> None:
        torch.save(PLAIN, tmp_path / "plain.pth")
        with pytest.raises(CheckpointError, match="holds no averaged weights"):
            read_weights(tmp_path / "plain.pth", use_ema=True)
        torch.save({"model_ema": AVERAGED}, tmp_path / "averaged.pth")
        with pytest.raises(CheckpointError, match=r"averaged weights only \(model_ema\); take them with --ema"):
            read_weights(tmp_path / "averaged.pth")

    @pytest.mark.parametrize(
        ("tree", "said"),
        [
            ({"state_dict": PLAIN, "args": Opaque()}, r"holds more than tensors \(.*Opaque\), and pickled code is never run"),
            ({"state_dict": PLAIN, "args": argparse.Namespace(lr=1)}, r"argparse.Namespace"),
            (nn.Linear(2, 2), "pickled code is never run"),
            ([torch.ones(1)], "no mapping of names to tensors"),
            ({}, "no mapping of names to tensors"),
            ({"a": 1.0}, "no mapping of names to tensors"),
            ({0: torch.ones(1)}, "no mapping of names to tensors"),
        ],
    )
    def test_no_pickle_and_nothing_but_tensors(self, tmp_path: Path, tree: Any, said: str) -> None:
        torch.save(tree, tmp_path / "w.pth")
        with pytest.raises(CheckpointError, match=said) as caught:
            read_weights(tmp_path / "w.pth")
        assert "\n" not in str(caught.value)

    def test_files_of_another_kind(self, tmp_path: Path) -> None:
        torch.save(PLAIN, tmp_path / "whole.pth")
        whole = (tmp_path / "whole.pth").read_bytes()
        (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
        (tmp_path / "empty.pth").write_bytes(b"")
        for name in ("broken.safetensors", "broken.pth"):
            (tmp_path / name).write_bytes(b"nothing at all")
        (tmp_path / "folder.pth").mkdir()
        for name in ("cut.pth", "empty.pth", "broken.safetensors", "broken.pth", "folder.pth"):
            with pytest.raises(CheckpointError, match=f"{name} cannot be read: ."):
                read_weights(tmp_path / name)
        with pytest.raises(CheckpointError, match="do not exist"):
            read_weights(tmp_path / "absent.pth")

    @pytest.mark.parametrize("zipped", [True, False])
    def test_a_file_cut_anywhere(self, tmp_path: Path, zipped: bool) -> None:
        """The older format of torch is a bare pickle, which fails in many ways; so does a text that is taken for one."""
        path = tmp_path / "w.pth"
        torch.save(PLAIN, path, _use_new_zipfile_serialization=zipped)
        whole = path.read_bytes()
        for content in (b"epoch 3: accuracy 0.9", *(whole[:size] for size in range(0, len(whole), 7))):
            path.write_bytes(content)
            with pytest.raises(CheckpointError, match=r"w\.pth (cannot be read: .|holds more than tensors)") as caught:
                read_weights(path)
            assert "\n" not in str(caught.value)

    def test_old_files_have_no_counters(self) -> None:
        network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        weights = {name: torch.full_like(tensor, 2) for name, tensor in network.state_dict().items() if "num_batches" not in name}
        fit_weights(network, weights, "old.pth")
        assert torch.equal(network.state_dict()["1.running_var"], torch.full((3,), 2.0))
        with pytest.raises(CheckpointError, match=r"old.pth belongs to another network \(missing: 1.running_var\)"):
            fit_weights(network, {name: tensor for name, tensor in weights.items() if name != "1.running_var"}, "old.pth")


def test_the_repair_may_be_called_twice() -> None:
    repair_torchvision()
    repair_torchvision()


def test_a_network_with_local_weights_becomes_a_checkpoint(tmp_path: Path) -> None:
    network = _timm()
    save_file(network.network.state_dict(), tmp_path / "w.safetensors")
    card = import_timm(NAME, tmp_path / "w.safetensors", CLASSES, tmp_path / "checkpoint")
    assert card.preprocessing == Preprocessing(
        image_size=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), crop_ratio=0.875, interpolation="bicubic"
    )
    loaded = load_classifier(tmp_path / "checkpoint")
    crops = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (card.preprocessing.mean, card.preprocessing.std))
    with torch.inference_mode():
        expected = network.network((crops.permute(0, 3, 1, 2) / 255 - mean) / std)
        torch.testing.assert_close(loaded.network(crops), expected)


def test_what_is_stated_is_laid_over_what_timm_says(tmp_path: Path) -> None:
    card = import_timm(
        NAME, None, CLASSES, tmp_path / "checkpoint", StatedPreprocessing(image_size=64, std=(1, 1, 1), interpolation="bilinear")
    )
    assert card.preprocessing == Preprocessing(image_size=64, mean=(0.485, 0.456, 0.406), std=(1.0, 1.0, 1.0), crop_ratio=0.875)


def test_torchvision_resnets_are_timm_networks(tmp_path: Path) -> None:
    """torchvision's own network says what the imported one says, from a file as its training script writes it."""
    import_timm_library()
    from torchvision.models import resnet18

    torch.manual_seed(0)
    original = resnet18(num_classes=len(CLASSES))
    for module in original.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    torch.save({"model": nn.DataParallel(original).state_dict(), "epoch": 90}, tmp_path / "w.pth")
    stated = StatedPreprocessing(image_size=48, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
    card = import_torch(tmp_path / "w.pth", "timm:resnet18", CLASSES, tmp_path / "checkpoint", stated)
    assert card.network.name == "timm:resnet18"
    crops = torch.randint(0, 256, (2, 48, 48, 3), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (stated.mean, stated.std))
    with torch.inference_mode():
        expected = original.eval()((crops.permute(0, 3, 1, 2) / 255 - mean) / std)
        torch.testing.assert_close(load_classifier(tmp_path / "checkpoint").network(crops), expected)


def test_wrong_names_and_weights_are_refused(tmp_path: Path) -> None:
    network = _timm()
    with pytest.raises(ConfigError, match=r"no network 'mobilenetv3_smal_050'; nearest are mobilenetv3_small_050"):
        create_timm("mobilenetv3_smal_050", 3)
    for name in ("hf-hub:timm/resnet18", "local-dir:weights", "timm/resnet18"):
        with pytest.raises(ConfigError, match="nothing is downloaded"):
            create_timm(name, 3)
    save_file(network.network.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ConfigError, match=r"has 3 classes \(classifier.weight\), the class list has 4: they must be equal"):
        import_timm(NAME, tmp_path / "w.safetensors", (*CLASSES, "d"), tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match=r"belongs to another network \(missing: conv1.0.weight, .*; left over: blocks"):
        import_timm("resnet10t", tmp_path / "w.safetensors", CLASSES, tmp_path / "checkpoint")
    with pytest.raises(ConfigError, match="1 class names"):
        import_timm(NAME, None, ("only",), tmp_path / "checkpoint")
    with pytest.raises(ConfigError, match=r"vit_tiny_patch16_224 does not take crops of 32 pixels: Input height \(32\)"):
        import_timm("vit_tiny_patch16_224", None, CLASSES, tmp_path / "checkpoint", StatedPreprocessing(image_size=32))
    assert not (tmp_path / "checkpoint").exists()


def test_weights_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    weights = _timm().network.state_dict()
    weights["classifier.bias"] = torch.tensor([0.0, float("nan"), 0.0])
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="logits that are not finite"):
        import_timm(NAME, tmp_path / "w.safetensors", CLASSES, tmp_path / "checkpoint", StatedPreprocessing(image_size=32))
    assert not (tmp_path / "checkpoint").exists()


def _timm():
    """A small network of timm's. `make` installs the extra, so that a timm which does not import fails here."""
    return create_timm(NAME, len(CLASSES))
