"""The networks against the published parameter counts and against slow oracles of the official code's border rules."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from distill.config import validate
from distill.errors import CheckpointError, ConfigError
from distill.models.classifier import Classifier, build_backbone, build_classifier, check_image_size
from distill.models.projection_head import ProjectionHead, unit_length
from distill.models.resnet import BLOCKS_PER_GROUP, ResNet, SamePadMaxPool, SelectiveKernel, ShortcutPool, conv, shortcut
from distill.models.saved_classifier import ClassifierCard, load_classifier, save_classifier
from distill.models.settings import DEPTHS, NetworkSettings
from distill.teacher_info import Preprocessing

PUBLISHED_MILLIONS = {
    (50, 1, False): 23.56,
    (50, 1, True): 35.28,
    (50, 2, False): 94.01,
    (50, 2, True): 140.43,
    (101, 1, False): 42.61,
    (101, 1, True): 64.79,
    (101, 2, False): 169.98,
    (101, 2, True): 257.38,
    (152, 1, False): 58.30,
    (152, 1, True): 89.12,
    (152, 2, False): 232.56,
    (152, 2, True): 353.75,
    (152, 3, True): 795.24,
}
"""(depth, width, selective kernels) -> encoder parameters and moving statistics, counted in the graphs of SimCLRv2's official code."""


pytestmark = pytest.mark.usefixtures("one_thread")


TINY = NetworkSettings(depth=10, width_multiplier=0.125, stem="cifar")


class TestParameterCounts:
    @pytest.mark.parametrize(("depth", "width", "sk"), PUBLISHED_MILLIONS, ids=str)
    def test_as_published(self, depth: int, width: int, sk: bool) -> None:
        with torch.device("meta"):
            network = ResNet(depth, width, 0.0625 if sk else 0.0)
        count = sum(t.numel() for name, t in network.state_dict().items() if not name.endswith("num_batches_tracked"))
        assert round(count / 1e6, 2) == PUBLISHED_MILLIONS[depth, width, sk]
        assert network.feature_dim == 2048 * width

    def test_small_one_by_hand(self) -> None:
        """ResNet-10, cifar stem, width 1/8: 8, 16, 32, 64 channels; batch norm counts 4 a channel with its statistics."""

        def block(c_in: int, c: int) -> int:
            return 9 * c_in * c + 9 * c * c + c_in * c + 3 * 4 * c  # two 3x3, one 1x1, three norms

        expected = 27 * 8 + 4 * 8 + block(8, 8) + block(8, 16) + block(16, 32) + block(32, 64)
        network = build_backbone(TINY)
        assert sum(t.numel() for name, t in network.state_dict().items() if "num_batches" not in name) == expected
        assert network.feature_dim == 64

    def test_settings_know_every_depth(self) -> None:
        assert set(DEPTHS) == BLOCKS_PER_GROUP.keys()
        for depth, (block, counts) in BLOCKS_PER_GROUP.items():
            convolutions = 2 if block.expansion == 1 else 3
            assert depth == convolutions * sum(counts) + 2, "stem and classifier make two"


def pooled_max(image_HW: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """TensorFlow's SAME max-pool, 3x3, stride 2, by its definition: total padding (out - 1) * 2 + 3 - n, the smaller half first."""
    sides = []
    for n in image_HW.shape:
        out = -(-n // 2)
        before = max((out - 1) * 2 + 3 - n, 0) // 2
        sides.append([(max(0, 2 * i - before), min(n, 2 * i - before + 3)) for i in range(out)])
    return np.array([[image_HW[top:bottom, left:right].max() for left, right in sides[1]] for top, bottom in sides[0]])


def pooled_average(image_HW: npt.NDArray[np.float64], stride: int) -> npt.NDArray[np.float64]:
    """2x2 average. Stride 2: one row and column of zeros at the far end, counted. Stride 1: SAME, which leaves padding out of the mean."""
    height, width = image_HW.shape
    rows = []
    for i in range(0, height, stride):
        row = []
        for j in range(0, width, stride):
            window = image_HW[i : i + 2, j : j + 2]
            row.append(window.sum() / 4 if stride == 2 else window.mean())
        rows.append(row)
    return np.array(rows)


SIDES = [(8, 8), (7, 7), (8, 7), (5, 6), (2, 2), (1, 1), (3, 1)]


class TestNarrowest:
    @pytest.mark.parametrize(("sk", "stem", "least"), [(0, "imagenet", 1 / 64), (0.0625, "cifar", 1 / 64), (0.0625, "imagenet", 1 / 32)])
    def test_every_layer_has_a_channel(self, sk: float, stem: str, least: float) -> None:
        fields = {"depth": 50, "sk_ratio": sk, "stem": stem}
        backbone = build_backbone(validate(NetworkSettings, {**fields, "width_multiplier": least}, "test")).eval()
        assert backbone(torch.rand(1, 3, 32, 32)).shape == (1, backbone.feature_dim)
        with pytest.raises(ConfigError, match=rf"give at least 1/{1 / least:g} \({least:g}\)"):
            validate(NetworkSettings, {**fields, "width_multiplier": least * 0.999}, "test")

    def test_the_width_is_of_our_resnets(self) -> None:
        assert NetworkSettings(name="timm:resnet18", width_multiplier=0.001).width_multiplier == 0.001


class TestBorders:
    @pytest.mark.parametrize("sides", SIDES, ids=str)
    def test_max_pool(self, sides: tuple[int, int]) -> None:
        image = np.random.default_rng(0).normal(-5, 1, sides)  # below zero: a zero of padding would win
        found = SamePadMaxPool()(torch.from_numpy(image)[None, None])[0, 0].numpy()
        np.testing.assert_array_equal(found, pooled_max(image))

    def test_max_pool_is_not_the_common_one(self) -> None:
        image = torch.arange(64.0).view(1, 1, 8, 8)
        assert not torch.equal(SamePadMaxPool()(image), nn.MaxPool2d(3, 2, padding=1)(image))

    @pytest.mark.parametrize("stride", [1, 2])
    @pytest.mark.parametrize("sides", SIDES, ids=str)
    def test_shortcut_pool(self, sides: tuple[int, int], stride: int) -> None:
        image = np.random.default_rng(1).normal(3, 1, sides)
        found = ShortcutPool(stride)(torch.from_numpy(image)[None, None])[0, 0].numpy()
        np.testing.assert_allclose(found, pooled_average(image, stride), atol=1e-12)

    @pytest.mark.parametrize("sk_ratio", [0.0, 0.0625])
    @pytest.mark.parametrize("stride", [1, 2])
    @pytest.mark.parametrize("side", [7, 8])
    def test_shortcut_and_residual_meet(self, side: int, stride: int, sk_ratio: float) -> None:
        x = torch.zeros(1, 4, side, side)
        assert (
            shortcut(4, 6, stride, sk_ratio).eval()(x).shape
            == conv(4, 6, 3, stride)(x).shape
            == (1, 6, -(-side // stride), -(-side // stride))
        )


class TestShapes:
    @pytest.mark.parametrize("depth", [10, 14, 50])
    @pytest.mark.parametrize("sk_ratio", [0.0, 0.0625])
    @pytest.mark.parametrize(("stem", "side", "last"), [("imagenet", 64, 2), ("imagenet", 65, 3), ("cifar", 28, 4), ("cifar", 9, 2)])
    def test_every_kind(self, depth: int, sk_ratio: float, stem: str, side: int, last: int) -> None:
        network = build_backbone(NetworkSettings(depth=depth, width_multiplier=0.125, sk_ratio=sk_ratio, stem=stem)).eval()
        with torch.inference_mode():
            maps = network.groups(network.stem(torch.rand(2, 3, side, side)))
            features = network(torch.rand(2, 3, side, side))
        assert maps.shape == (2, network.feature_dim, last, last)
        assert features.shape == (2, network.feature_dim)
        assert torch.isfinite(features).all()

    def test_blocks_start_as_the_identity(self) -> None:
        """The last norm of a block starts at scale 0, so a block without projection passes what is not negative."""
        block = build_backbone(NetworkSettings(depth=26, width_multiplier=0.125)).eval().get_submodule("groups.0.1")
        x = torch.rand(2, 32, 6, 6)
        assert torch.equal(block(x), x)

    def test_initial_weights_have_the_official_spread(self) -> None:
        """VarianceScaling(fan-in, truncated normal): after the cut at two sigma the standard deviation is 1 / sqrt(fan-in)."""
        torch.manual_seed(0)
        weight = conv(64, 512, 3).weight.detach()
        assert weight.std().item() == pytest.approx((64 * 9) ** -0.5, rel=0.01)
        assert weight.abs().max().item() <= 2 * (64 * 9) ** -0.5 / 0.87962566


def softmax_over_streams(kernel: SelectiveKernel, features: Tensor) -> tuple[Tensor, Tensor]:
    """(both streams [2,B,C,H,W], their shares [2,B,C]) the long way round: a softmax over the two, in float64."""
    kernel = kernel.double()
    streams = torch.stack(kernel.streams(features.double()).chunk(2, dim=1))
    summary = streams.sum(dim=0).mean(dim=(2, 3), keepdim=True)
    logits = torch.stack(kernel.select(kernel.squeeze(summary)).chunk(2, dim=1))
    return streams, logits.softmax(dim=0)[..., 0, 0]


class TestSelectiveKernel:
    @pytest.mark.parametrize("stride", [1, 2])
    def test_shares_sum_to_one_and_mix_the_streams(self, stride: int) -> None:
        torch.manual_seed(0)
        kernel = SelectiveKernel(6, 40, stride, 0.5).eval()
        nn.init.normal_(kernel.select.weight)  # far from an even mix
        features = torch.randn(3, 6, 7, 8)
        found = kernel(features).detach()
        streams, shares = softmax_over_streams(kernel, features)
        torch.testing.assert_close(shares.sum(dim=0), torch.ones(3, 40, dtype=torch.float64))
        assert shares.min() < 0.3
        torch.testing.assert_close(found.double(), (shares[..., None, None] * streams).sum(dim=0), atol=1e-5, rtol=1e-5)

    def test_squeezed_width_has_a_floor(self) -> None:
        assert SelectiveKernel(8, 64, 1, 0.0625).squeeze[0].out_channels == 32
        assert SelectiveKernel(8, 1024, 1, 0.0625).squeeze[0].out_channels == 64

    def test_basic_blocks_have_none(self) -> None:
        """As in the official code: selective kernels change their stem and shortcuts only."""
        for depth, expected in ((18, False), (14, True)):
            with torch.device("meta"):
                network = build_backbone(NetworkSettings(depth=depth, sk_ratio=0.0625))
            assert any(isinstance(module, SelectiveKernel) for module in network.modules()) == expected


class TestProjectionHead:
    def test_widths(self) -> None:
        head = ProjectionHead(20, num_layers=3, embedding_dim=7)
        kinds = [[type(part) for part in layer.children()] for layer in head.layers]
        hidden = [nn.Linear, nn.BatchNorm1d, nn.ReLU]
        assert kinds == [hidden, hidden, hidden[:2]]
        dense = [part for part in head.modules() if isinstance(part, nn.Linear)]
        assert [tuple(part.weight.shape) for part in dense] == [(20, 20), (20, 20), (7, 20)]
        assert all(part.bias is None for part in dense)
        assert head(torch.rand(4, 20)).shape == (4, 7)

    def test_the_last_layer_has_no_offset_to_train(self) -> None:
        head = ProjectionHead(8, num_layers=2, embedding_dim=4)
        frozen = [name for name, p in head.named_parameters() if not p.requires_grad]
        assert frozen == ["layers.1.1.bias"]
        assert not dict(head.named_parameters())["layers.1.1.bias"].any()
        # So every embedding dimension has mean 0 over the batch.
        assert head(torch.rand(50, 8)).mean(dim=0).abs().max() < 1e-5

    def test_first_layers_are_shared_not_copied(self) -> None:
        head = ProjectionHead(8, num_layers=3)
        assert list(head.first_layers(0)) == []
        assert list(head.first_layers(2)) == list(head.layers)[:2]
        for count in (-1, 3):
            with pytest.raises(ValueError, match=f"count {count} is not between 0 and 2"):
                head.first_layers(count)

    def test_unit_length(self) -> None:
        torch.testing.assert_close(unit_length(torch.tensor([[3.0, 4.0], [0.0, -2.0]])), torch.tensor([[0.6, 0.8], [0.0, -1.0]]))


class Means(nn.Module):
    """Channel means as logits: shows what the first layer made of the pixels."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return images_BCHW.mean(dim=(2, 3))


class TestClassifier:
    def test_normalises_exactly_once(self) -> None:
        """By hand: 255 -> (1 - 0.5) / 0.25 = 2; 0 -> (0 - 0.4) / 0.2 = -2; 51 -> (0.2 - 0.2) / 0.5 = 0."""
        network = Classifier(Means(), Preprocessing(image_size=8, mean=(0.5, 0.4, 0.2), std=(0.25, 0.2, 0.5)))
        crops = torch.tensor([255, 0, 51], dtype=torch.uint8).expand(2, 8, 8, 3)
        torch.testing.assert_close(network(crops), torch.tensor([[2.0, -2.0, 0.0]] * 2))

    def test_channels_are_not_mixed_with_pixels(self) -> None:
        crops = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
        crops[0, :4, :, 1] = 255
        network = Classifier(nn.Identity(), Preprocessing(image_size=8))
        found = network(crops)
        assert found.dtype == torch.float32
        assert found[0, 1, :4].min() == 1
        assert found.sum() == 32

    def test_logits_start_at_zero(self) -> None:
        network = build_classifier(TINY, 5, Preprocessing(image_size=8))
        logits = network(torch.randint(0, 256, (3, 8, 8, 3), dtype=torch.uint8))
        assert logits.shape == (3, 5)
        assert not logits.any()

    def test_head_layers_lie_under_the_classifier(self) -> None:
        network = build_classifier(TINY, 5, Preprocessing(image_size=8), num_head_layers=2)
        assert [tuple(p.shape) for name, p in network.named_parameters() if name.startswith("body.neck") and p.ndim == 2] == [(64, 64)] * 2

    @pytest.mark.parametrize(("stem", "stride"), [("imagenet", 32), ("cifar", 8)])
    def test_image_smaller_than_the_stride(self, stem: str, stride: int) -> None:
        network = TINY.replace(stem=stem)
        assert network.total_stride == stride
        with pytest.raises(ConfigError, match=f"image_size {stride - 1} is smaller than the network's total stride {stride}"):
            build_classifier(network, 2, Preprocessing(image_size=stride - 1))
        check_image_size(network, stride)

    def test_only_ours_can_be_pretrained(self) -> None:
        with pytest.raises(ConfigError, match="'timm:resnet18' has no backbone of ours"):
            build_backbone(NetworkSettings(name="timm:resnet18"))

    @pytest.mark.parametrize("tree", [{"name": "vgg"}, {"depth": 20}, {"width_multiplier": 0}, {"stem": "tiny"}])
    def test_unknown_networks(self, tree: dict[str, object]) -> None:
        with pytest.raises(ConfigError, match=next(iter(tree))):
            validate(NetworkSettings, tree, origin="network")


class TestSavedClassifier:
    def card(self) -> ClassifierCard:
        preprocessing = Preprocessing(image_size=8, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
        return ClassifierCard(
            network=TINY, num_head_layers=1, class_names=("a", "b", "c"), preprocessing=preprocessing, origin={"run": "x"}
        )

    def test_round_trip(self, tmp_path: Path) -> None:
        torch.manual_seed(1)
        network = build_classifier(TINY, 3, self.card().preprocessing, num_head_layers=1)
        nn.init.normal_(network.body.linear.weight)  # type: ignore[arg-type, union-attr]
        crops = torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8)
        network.train()(crops)  # moves the norms' statistics, which must be kept too
        save_classifier(tmp_path / "c", network, self.card())
        saved = load_classifier(tmp_path / "c")
        assert saved.card == self.card()
        assert not saved.network.training
        assert torch.equal(saved.network(crops), network.eval()(crops))

    def test_of_another_kind_or_class_count(self, tmp_path: Path) -> None:
        network = build_classifier(TINY, 4, self.card().preprocessing, num_head_layers=1)
        save_classifier(tmp_path / "c", network, self.card())
        with pytest.raises(CheckpointError, match=r"another network \(other shape: body.linear.bias, body.linear.weight\)"):
            load_classifier(tmp_path / "c")
        from distill.checkpoint import save_checkpoint

        save_checkpoint(tmp_path / "d", network.state_dict(), {"kind": "pretrained"})
        with pytest.raises(CheckpointError, match="holds a 'pretrained' checkpoint, not a classifier"):
            load_classifier(tmp_path / "d")


NARROW_STEPS = """
import torch
from distill.models.classifier import build_classifier
from distill.models.settings import NetworkSettings
from distill.teacher_info import Preprocessing
torch.set_num_threads(1)
network = build_classifier(NetworkSettings(depth=10, width_multiplier=0.0625, stem="cifar"), 10, Preprocessing(image_size=28))
for _ in range(20):
    crops = torch.randint(0, 255, (100, 28, 28, 3), dtype=torch.uint8)
    torch.nn.functional.cross_entropy(network(crops), torch.randint(0, 10, (100,))).backward()
"""


def test_a_narrow_network_trains_on_a_processor_without_avx512() -> None:
    """In a process of its own, because what goes wrong is its heap; a processor with more is told to do with AVX2."""
    done = subprocess.run(
        [sys.executable, "-c", NARROW_STEPS], env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
