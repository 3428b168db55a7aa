"""Network names of the command line."""

from __future__ import annotations

import pytest

from distill.errors import ConfigError
from distill.models.arch_names import arch_name, parse_arch
from distill.models.settings import NetworkSettings


@pytest.mark.parametrize(
    ("name", "network"),
    [
        ("resnet50", NetworkSettings(depth=50)),
        ("resnet152-x3-sk", NetworkSettings(depth=152, width_multiplier=3, sk_ratio=0.0625)),
        ("resnet18-x0.5-cifar", NetworkSettings(depth=18, width_multiplier=0.5, stem="cifar")),
        ("resnet26-x0.25-sk0.5-cifar", NetworkSettings(depth=26, width_multiplier=0.25, sk_ratio=0.5, stem="cifar")),
        ("timm:resnet18.a1_in1k", NetworkSettings(name="timm:resnet18.a1_in1k")),
    ],
)
def test_names_are_read_and_written(name: str, network: NetworkSettings) -> None:
    assert parse_arch(name) == network
    assert arch_name(network) == name


@pytest.mark.parametrize("name", ["resnet50-x1", "resnet050", "resnet50-sk0.0625", "resnet50-x1.00"])
def test_longer_spellings_of_the_same(name: str) -> None:
    assert arch_name(parse_arch(name)) in ("resnet50", "resnet50-sk")


@pytest.mark.parametrize(
    "name", ["", "resnet", "ResNet50", "resnet50-sk-x2", "resnet50-cifar-x2", "resnet50x2", "resnet50-x", "vgg16", "timm:", "resnet50-"]
)
def test_other_spellings_are_told_the_right_one(name: str) -> None:
    with pytest.raises(ConfigError, match=r"is not of the form resnetDEPTH\[-xWIDTH\]\[-sk\[RATIO\]\]\[-cifar\], such as resnet50"):
        parse_arch(name)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("resnet20", "20 is none of our depths 10, 14, 18, 26, 34, 50, 101, 152, 200"),
        ("resnet50-x0", "width is above 0"),
        ("resnet50-x17", "at most 16"),
        ("resnet50-sk0", "ratio of selective kernels above 0"),
        ("resnet50-sk2", "at most 1"),
        ("resnet50-x0.01-sk", r"width_multiplier 0\.01 leaves nothing of the 32 channels .* give at least 1/32 \(0\.03125\)"),
        ("resnet50-x0.03-sk", "give at least 1/32"),
        ("resnet50-x0.015", r"give at least 1/64 \(0\.015625\)"),
        ("resnet50-x0.015-sk-cifar", "give at least 1/64"),
    ],
)
def test_numbers_out_of_range(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_arch(name)
