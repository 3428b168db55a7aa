"""Networks of timm: made, described, loaded from local files only. Skipped where the extra is not installed."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from distill.errors import CheckpointError, ConfigError
from distill.models.saved_classifier import load_classifier
from distill.models.timm_networks import create_timm, read_weights, repair_torchvision
from distill.teacher_info import Preprocessing
from export.imports import import_timm

NAME = "mobilenetv3_small_050"
CLASSES = ("a", "b", "c")


class Opaque:
    """Something that only pickle could load."""


def test_weights_files_are_read_without_pickle(tmp_path: Path) -> None:
    tensor = torch.arange(6.0)
    save_file({"a": tensor}, tmp_path / "w.safetensors")
    torch.save({"epoch": 3, "state_dict": {"module.a": tensor}}, tmp_path / "w.pth")
    for path in (tmp_path / "w.safetensors", tmp_path / "w.pth"):
        assert torch.equal(read_weights(path)["a"], tensor)
    torch.save({"state_dict": {"a": tensor}, "args": Opaque()}, tmp_path / "pickled.pth")
    with pytest.raises(CheckpointError, match="pickled code is never run"):
        read_weights(tmp_path / "pickled.pth")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_weights(tmp_path / "broken.safetensors")
    with pytest.raises(CheckpointError, match="do not exist"):
        read_weights(tmp_path / "absent.pth")
    torch.save([tensor], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="no mapping of names to tensors"):
        read_weights(tmp_path / "list.pth")


def test_the_repair_may_be_called_twice() -> None:
    repair_torchvision()
    repair_torchvision()


def test_a_network_with_local_weights_becomes_a_checkpoint(tmp_path: Path) -> None:
    network = _timm()
    save_file(network.network.state_dict(), tmp_path / "w.safetensors")
    card = import_timm(NAME, tmp_path / "w.safetensors", CLASSES, tmp_path / "checkpoint")
    assert card.preprocessing == Preprocessing(image_size=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), crop_ratio=0.875)
    loaded = load_classifier(tmp_path / "checkpoint")
    crops = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (card.preprocessing.mean, card.preprocessing.std))
    with torch.inference_mode():
        expected = network.network((crops.permute(0, 3, 1, 2) / 255 - mean) / std)
        torch.testing.assert_close(loaded.network(crops), expected)


def test_wrong_names_and_weights_are_refused(tmp_path: Path) -> None:
    network = _timm()
    with pytest.raises(ConfigError, match=r"no network 'mobilenetv3_smal_050'; nearest are mobilenetv3_small_050"):
        create_timm("mobilenetv3_smal_050", 3)
    save_file(network.network.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="belongs to another network"):
        create_timm(NAME, 4, tmp_path / "w.safetensors")
    with pytest.raises(ConfigError, match="1 class names"):
        import_timm(NAME, None, ("only",), tmp_path / "checkpoint")


def _timm():
    """A small network of timm's. `make` installs the extra, so that a timm which does not import fails here."""
    return create_timm(NAME, len(CLASSES))
