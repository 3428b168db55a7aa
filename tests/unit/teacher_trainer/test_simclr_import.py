"""The import of published SimCLR checkpoints: numbers of the official graphs, every variation of their names, and wrong files."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distill.checkpoint import load_checkpoint, load_weights
from distill.errors import BadInput, CheckpointError, ConfigError
from distill.models.classifier import ResNetClassifier
from distill.models.projection_head import ProjectionHead
from distill.models.resnet import ResNet
from distill.models.saved_classifier import load_classifier
from distill.teacher_info import Preprocessing
from teacher_trainer.simclr_architecture import find_network, our_backbone, our_head, torch_shape
from teacher_trainer.simclr_files import find_checkpoint
from teacher_trainer.simclr_import import SimclrFound, import_simclr
from teacher_trainer.simclr_names import read_tf1_names
from teacher_trainer.simclr_object_graph import official_of_full_name

REAL = Path(__file__).parent / "simclr_tf"
HELD = sorted(path.name for path in REAL.iterdir() if path.is_dir())

PAPER_TABLE = {  # millions of parameters: arXiv 2006.10029, table 1
    **{"r50_1x_sk0": 24, "r50_1x_sk1": 35, "r50_2x_sk0": 94, "r50_2x_sk1": 140, "r101_1x_sk0": 43, "r101_1x_sk1": 65},
    **{"r101_2x_sk0": 170, "r101_2x_sk1": 257, "r152_1x_sk0": 58, "r152_1x_sk1": 89, "r152_2x_sk0": 233, "r152_2x_sk1": 354},
    "r152_3x_sk1": 795,
}


def import_into(path: Path, folder: Path, size: int = 64, **more: Any) -> SimclrFound:
    return import_simclr(path, folder, class_names=more.pop("class_names", None), image_size=size, **more)


def relative_error(found: Tensor, expected: Any) -> float:
    return float(np.abs(found.numpy()[: len(expected)] - expected).max() / np.abs(expected).max())


def hear(module: nn.Module, name: str, said: dict[str, Tensor]) -> None:
    module.register_forward_hook(lambda _, __, result: said.__setitem__(name, result.movedim(1, -1) if result.ndim == 4 else result))


@pytest.mark.parametrize("name", HELD)
def test_the_numbers_of_the_official_graph(name: str, tmp_path: Path) -> None:
    found = import_into(REAL / name, tmp_path)
    network = load_classifier(tmp_path / "checkpoint").network
    body, said = network.body, dict[str, Tensor]()
    assert isinstance(body, ResNetClassifier)
    hear(body.backbone, "final_avg_pool", said)
    hear([module for module in body.backbone.stem if isinstance(module, nn.Conv2d)][-1], "initial_conv", said)
    hear(body.backbone.stem, "initial_max_pool", said)
    for number, group in enumerate(body.backbone.groups, start=1):
        hear(group, f"block_group{number}", said)
    for number, layer in enumerate(body.neck, start=1):
        hear(layer, f"proj_{number}", said)
    with np.load(REAL / name / "ref.npz") as reference, torch.no_grad():
        logits = network(torch.from_numpy(reference["inputs_uint8"]))
        said["logits" if "logits" in reference else "logits_sup"] = logits
        errors = {key: relative_error(tensor, reference[key]) for key, tensor in said.items()}
    assert len(errors) == 7 + (found.classifier_after or 0) + 1
    assert max(errors.values()) <= 1e-4, errors


def test_what_the_real_files_are(tmp_path: Path) -> None:
    tf1 = import_into(REAL / "tf1_r50_sk1_ft1pct", tmp_path / "1")
    assert (tf1.depth, tf1.width_multiplier, tf1.sk_ratio, tf1.stem, tf1.format) == (50, 0.125, 0.0625, "imagenet", "tf1")
    assert (tf1.num_head_layers, tf1.embedding_dim, tf1.classifier_after, tf1.num_classes, tf1.step) == (3, 128, 1, 10, 751)
    tf2 = import_into(REAL / "tf2_r18_sk1_ft1", tmp_path / "2")
    assert (tf2.depth, tf2.width_multiplier, tf2.sk_ratio, tf2.stem, tf2.format) == (18, 0.25, 0.0625, "imagenet", "tf2")
    assert (tf2.kind, tf2.classifier_after, tf2.num_classes, tf2.step) == ("fine-tuned", 1, 10, 3754)
    card = load_classifier(tmp_path / "2" / "checkpoint").card
    assert card.num_head_layers == 1
    assert card.class_names == tuple("0123456789")
    assert card.preprocessing == Preprocessing(image_size=64, crop_ratio=0.875, interpolation="bicubic")
    assert "ResNet-18, width x0.25, selective kernels (sk_ratio 0.0625), imagenet stem" in tf2.describe()
    assert "step 3754: fine-tuned with 10 % of the labels" in tf2.describe()


def inventories() -> dict[str, Any]:
    return json.loads(gzip.decompress((REAL / "tf1_inventory_all_archs.json.gz").read_bytes()))


@pytest.mark.parametrize("arch", sorted(inventories()))
def test_names_and_shapes_of_published_architectures(arch: str) -> None:
    listed = inventories()[arch]["vars"]
    names = read_tf1_names(list(listed))
    assert not names.unknown
    shapes = {official: tuple(listed[name]) for official, name in names.weights.items()}
    network = find_network(shapes, None, arch)
    depth, width, sk = arch.split("_")
    assert (f"r{network.depth}", f"{network.width_multiplier:g}x") == (depth, width)
    assert network.sk_ratio == (0.0625 if sk == "sk1" else 0)
    assert network.stem == "imagenet"
    backbone, ours = our_backbone(network)
    head, ours_in_head = our_head(backbone.feature_dim, 3, 128)
    for module, own in ((backbone, ours), (head, ours_in_head)):
        state = module.state_dict()
        assert {official: tuple(state[name].shape) for official, name in own.items()} == {
            official: torch_shape(shapes[official]) for official in own
        }
    assert shapes.keys() == ours.keys() | ours_in_head.keys() | {
        f"head_supervised/linear_layer/dense/{part}" for part in ("kernel", "bias")
    }
    assert {name for name in backbone.state_dict() if not name.endswith("num_batches_tracked")} == set(ours.values())
    if arch in PAPER_TABLE:
        parameters = sum(int(np.prod(shapes[official])) for official in ours)
        assert round(parameters / 1e6) == PAPER_TABLE[arch]


NETWORKS: dict[str, dict[str, Any]] = {
    "18": {"depth": 18},
    "18 cifar, width 0.1": {"depth": 18, "stem": "cifar", "width": 0.1},
    "34, head of 2": {"depth": 34, "num_head_layers": 2},
    "50, no head": {"depth": 50, "num_head_layers": 0, "classifier_after": 0},
    "50 sk": {"depth": 50, "sk": 0.0625, "classifier_after": 2},
    "50 sk cifar": {"depth": 50, "sk": 0.0625, "stem": "cifar", "classifier_after": 0},
    "50 sk of another ratio": {"depth": 50, "sk": 0.8, "width": 0.125},
    "101": {"depth": 101, "classifier_after": 0},
    "152 sk, head of 4": {"depth": 152, "sk": 0.0625, "num_head_layers": 4, "classifier_after": 3},
    "200": {"depth": 200, "width": 1 / 32},
    "linear head, classifier on it": {"depth": 18, "num_head_layers": 1, "classifier_after": 1, "embedding_dim": 12},
    "classifier on the output": {"depth": 18, "num_head_layers": 3, "classifier_after": 3, "embedding_dim": 12},
}


def check_same(official: Any, folder: Path, found: SimclrFound) -> None:
    """The imported classifier says what the network said whose variables were written."""
    assert (found.depth, found.width_multiplier, found.stem) == (official.depth, official.width, official.stem)
    assert found.sk_ratio == official.sk
    assert (found.num_head_layers, found.num_classes) == (official.num_head_layers, official.num_classes)
    body = load_classifier(folder / "checkpoint").network.body
    assert isinstance(body, ResNetClassifier)
    loaded = body.backbone.state_dict()
    for name, tensor in official.backbone.state_dict().items():
        assert torch.equal(loaded[name], tensor), name
    features = torch.rand(4, official.backbone.feature_dim, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, logits = official.classify(features), body.linear(body.neck(features))
    assert expected.std() > 1e-3
    if official.num_head_layers and official.classifier_after == official.num_head_layers:
        torch.testing.assert_close(logits, expected)  # the last layer is multiplied into the classifier
    else:
        assert torch.equal(logits, expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_tf1_round_trip(tf: Any, tmp_path: Path, name: str) -> None:
    official = tf.network(**NETWORKS[name])
    tf.write_bundle(tmp_path / "model.ckpt-5", official.tf1() | {"global_step": np.array(5)})
    found = import_into(tmp_path / "model.ckpt-5", tmp_path / "out", classifier_after=official.classifier_after)
    check_same(official, tmp_path / "out", found)
    assert (found.format, found.step) == ("tf1", 5)


TF2_NETWORKS = {name: network for name, network in NETWORKS.items() if network["depth"] <= 50} | {
    "18 sk": {"depth": 18, "sk": 0.0625},
    "18 sk cifar": {"depth": 18, "sk": 0.0625, "stem": "cifar"},
    "34 sk": {"depth": 34, "sk": 0.0625, "bn": "sync_batch_normalization"},
}


@pytest.mark.parametrize("name", TF2_NETWORKS)
def test_tf2_round_trip(tf: Any, tmp_path: Path, name: str) -> None:
    official = tf.network(**TF2_NETWORKS[name])
    tf.write_bundle(tmp_path / "ckpt-5", tf.tf2_tensors(official))
    found = import_into(tmp_path / "ckpt-5.index", tmp_path / "out", classifier_after=official.classifier_after)
    check_same(official, tmp_path / "out", found)
    assert (found.format, found.step) == ("tf2", 7)


def test_tf2_without_its_object_graph(tf: Any, tmp_path: Path) -> None:
    official = tf.network(**TF2_NETWORKS["50 sk"])
    tensors = tf.tf2_tensors(official, slots=lambda path: "linear_layers/2" not in path)
    del tensors["_CHECKPOINTABLE_OBJECT_GRAPH"]
    tf.write_bundle(tmp_path / "ckpt-5", tensors)
    found = import_into(tmp_path, tmp_path / "out")
    check_same(official, tmp_path / "out", found)


@pytest.mark.parametrize("structure", [True, False])
@pytest.mark.parametrize("name", ["18", "18 sk", "34 sk", "50 sk", "50 sk cifar", "classifier on the output"])
def test_saved_model_with_positions_for_keys(tf: Any, tmp_path: Path, name: str, structure: bool) -> None:
    official = tf.network(**TF2_NETWORKS[name])
    folder = tmp_path / "saved_model" / "3754"
    tf.write_bundle(folder / "variables" / "variables", tf.saved_model_tensors(official, structure=structure))
    (folder / "saved_model.pb").write_bytes(b"")
    found = import_into(folder, tmp_path / "out", classifier_after=official.classifier_after)
    check_same(official, tmp_path / "out", found)
    assert (found.format, found.step) == ("saved_model", 3754)


def test_full_names_may_begin_at_any_number(tf: Any, tmp_path: Path) -> None:
    official = tf.network(depth=18)
    for name in ("conv2d", "batch_normalization"):
        official.variables = [shifted(one, name) for one in official.variables]
    folder = tmp_path / "m"
    tf.write_bundle(folder / "variables" / "variables", tf.saved_model_tensors(official, structure=False))
    (folder / "saved_model.pb").write_bytes(b"")
    check_same(official, tmp_path / "out", import_into(folder, tmp_path / "out", classifier_after=1))


def shifted(variable: Any, layer: str) -> Any:
    """The variable as named in a process that had built a ResNet-50 before."""
    if not variable.full_name.startswith("resnet"):
        return variable
    scope, last, part = variable.full_name.rsplit("/", 2)
    if last.split("_")[0] != layer.split("_")[0]:
        return variable
    number = last.removeprefix(layer).lstrip("_")
    return type(variable)(variable.tf1, variable.path, f"resnet_1/{scope}/{layer}_{int(number or 0) + 53}/{part}", variable.value)


def test_full_names_of_other_things() -> None:
    assert official_of_full_name("resnet/conv2d_fixed_padding/conv2d/kernel:0") == "base_model/conv2d/kernel"
    assert official_of_full_name("head_supervised/linear_layer/dense_3/bias") == "head_supervised/linear_layer/dense/bias"
    assert official_of_full_name("projection_head/nl_1/dense_1/kernel/Momentum") is None
    assert official_of_full_name("dense/kernel") is None
    assert official_of_full_name("iter") is None


def with_slots(tensors: dict[str, Any], trained: Callable[[str], bool], slot: str = "Momentum") -> dict[str, Any]:
    trainable = {name: value for name, value in tensors.items() if "moving" not in name and trained(name)}
    return tensors | {f"{name}/{slot}": np.full_like(value, 0.1) for name, value in trainable.items()}


def test_tf1_pretrained_with_everything_beside_the_weights(tf: Any, tmp_path: Path) -> None:
    official = tf.network(depth=18, classifier_after=0)
    tensors = with_slots(official.tf1(), lambda name: True)
    tensors |= {f"ema_model/{name}": value + 1 for name, value in official.tf1().items() if "supervised" not in name}
    tensors |= {"global_step": np.array(250_228), "memory": np.zeros((4, 3), np.float32), "memory_ptr": np.array(2)}
    tensors |= {"beta1_power": np.float32(0.9).reshape(()), "base_model/conv2d/kernel/Adam_1": np.zeros(1, np.float32)}
    tf.write_bundle(tmp_path / "model.ckpt-250228", tensors)
    found = import_into(tmp_path / "model.ckpt-250228", tmp_path / "out")
    assert found.kind == "pretrained"
    num_trainable = len([name for name in official.tf1() if "moving" not in name])
    assert found.ignored == {"optimiser slots": num_trainable + 2, "EMA copies": len(official.tf1()) - 2, "memory": 2, "counters": 1}
    check_same(official, tmp_path / "out", found)  # the classifier that looked on
    check_pretrained(official, tmp_path / "out", offset=0)
    assert found.taken == "pretrained"  # such a classifier is no teacher
    assert load_classifier(tmp_path / "out" / "checkpoint").card.origin["looked_on"] is True
    import_into(tmp_path / "model.ckpt-250228", tmp_path / "ema", use_ema=True)
    check_pretrained(official, tmp_path / "ema", offset=1)


def check_pretrained(official: Any, folder: Path, offset: int) -> None:
    """The pretrained checkpoint holds backbone and head under the names of our contrastive network."""
    found = load_checkpoint(folder / "pretrained")
    manifest = found.manifest
    assert (manifest["kind"], manifest["num_head_layers"], manifest["embedding_dim"]) == ("pretrained", 3, 24)
    assert manifest["network"]["depth"] == official.depth
    backbone = ResNet(official.depth, official.width, official.sk, official.stem)
    head = ProjectionHead(backbone.feature_dim, 3, 24)
    both = nn.ModuleDict({"backbone": backbone, "head": head})
    load_weights(both, found.weights, "test")
    for module, original in ((backbone, official.backbone), (head, official.head)):
        expected = original.state_dict()
        for name, tensor in module.state_dict().items():
            moved = 0 if "num_batches" in name or name == "layers.2.1.bias" else offset
            torch.testing.assert_close(tensor, expected[name] + moved)


def test_a_classifier_that_looked_on_is_in_nobodys_way(tf: Any, tmp_path: Path) -> None:
    """One's own classes are not those of the classifier beside the pretrained network; asked for, it is the teacher."""
    official = tf.network(depth=18, classifier_after=0)
    tf.write_bundle(tmp_path / "m", with_slots(official.tf1(), lambda name: True) | {"global_step": np.array(250_228)})
    for number, given in enumerate([{"class_names": ["a", "b", "c"]}, {"take": "pretrained"}]):
        folder = tmp_path / str(number)
        found = import_into(tmp_path / "m", folder, **given)
        assert (found.taken, found.classifier_after) == ("pretrained", None)
        assert f"its classifier of {official.num_classes} classes, which looked on in pretraining, is left out" in found.describe()
        assert f"classifier: {official.num_classes} classes (left out)" in found.describe()
        assert [path.name for path in folder.iterdir()] == ["pretrained"]
    assert load_checkpoint(folder / "pretrained").manifest["preprocessing"]["mean"] == [0, 0, 0]
    assert import_into(tmp_path / "m", tmp_path / "taken", take="classifier").taken == "classifier"
    with pytest.raises(ConfigError, match="3 class names are given"):
        import_into(tmp_path / "m", tmp_path / "x", take="classifier", class_names=["a", "b", "c"])


def test_where_nothing_tells_own_classes_need_a_word(tf: Any, tmp_path: Path) -> None:
    tf.write_bundle(tmp_path / "m", tf.network(depth=18).tf1() | {"global_step": np.array(999)})
    with pytest.raises(ConfigError, match=r"3 class names are given.*or take: pretrained \(--take pretrained\) to fine-tune it"):
        import_into(tmp_path / "m", tmp_path / "x", class_names=["a", "b", "c"])
    found = import_into(tmp_path / "m", tmp_path / "out", class_names=["a", "b", "c"], take="pretrained")
    assert (found.taken, "looked on" in found.describe()) == ("pretrained", False)


def test_what_is_to_be_taken_must_be_there(tf: Any, tmp_path: Path) -> None:
    tuned = with_slots(tf.network(depth=18).tf1(), lambda name: "head_contrastive" not in name) | {"global_step": np.array(751)}
    tf.write_bundle(tmp_path / "tuned", tuned)
    with pytest.raises(CheckpointError, match=r"take: pretrained, but .* is fine-tuned"):
        import_into(tmp_path / "tuned", tmp_path / "x", take="pretrained")
    tf.write_bundle(tmp_path / "bare", tf.network(depth=18, classifier_after=None).tf1())
    with pytest.raises(CheckpointError, match=r"take: classifier, but .* holds none"):
        import_into(tmp_path / "bare", tmp_path / "x", take="classifier")
    assert not (tmp_path / "x").exists()


def test_pretrained_without_a_classifier(tf: Any, tmp_path: Path) -> None:
    official = tf.network(depth=50, sk=0.0625, classifier_after=None)
    tf.write_bundle(tmp_path / "model.ckpt-9", official.tf1(), num_shards=2)
    found = import_into(tmp_path / "model.ckpt-9", tmp_path / "out")
    assert (found.kind, found.num_classes, found.classifier_after, found.step) == ("pretrained", None, None, 9)
    assert not (tmp_path / "out" / "checkpoint").exists()
    check_pretrained(official, tmp_path / "out", offset=0)
    with pytest.raises(CheckpointError, match="holds no classifier"):
        import_into(tmp_path / "model.ckpt-9", tmp_path / "again", classifier_after=1)


def test_averages_with_a_suffix(tf: Any, tmp_path: Path) -> None:
    official = tf.network(depth=18, classifier_after=0)
    averaged = {f"{name}/ExponentialMovingAverage": value for name, value in official.tf1().items() if "moving" not in name}
    raw = {name: value if "moving" in name else value + 1 for name, value in official.tf1().items()}
    tf.write_bundle(tmp_path / "m", raw | averaged)
    found = import_into(tmp_path / "m", tmp_path / "out", use_ema=True, classifier_after=0)
    check_same(official, tmp_path / "out", found)
    assert found.ignored == {"weights before averaging": len(averaged)}


def tf2_with_second_root(tf: Any, official: Any, root: str, second_first: bool, left_out: str = "-") -> dict[str, Any]:
    """A `tf.train.Checkpoint` of the network plus 1, with the network itself held by a second root."""
    of = {one.path: (one.full_name, one.value + 1) for one in official.variables}
    copies = {one.path.replace("model", root, 1): (one.full_name, one.value) for one in official.variables if left_out not in one.path}
    variables = {**copies, **of} if second_first else {**of, **copies}
    tensors = {f"{path}/.ATTRIBUTES/VARIABLE_VALUE": value for path, (_, value) in variables.items()}
    names = {path: full_name for path, (full_name, _) in variables.items()}
    return tensors | {
        "_CHECKPOINTABLE_OBJECT_GRAPH": tf.object_graph({path: f"{path}/.ATTRIBUTES/VARIABLE_VALUE" for path in names}, names)
    }


@pytest.mark.parametrize(("root", "second_first"), [("ema_model", True), ("ema_model", False), ("model_ema", False), ("EMA", True)])
@pytest.mark.parametrize("with_graph", [True, False])
@pytest.mark.parametrize("name", ["18", "50 sk cifar"])
def test_tf2_averages_in_a_second_model(tf: Any, tmp_path: Path, name: str, root: str, second_first: bool, with_graph: bool) -> None:
    official = tf.network(**TF2_NETWORKS[name])
    tensors = tf2_with_second_root(tf, official, root, second_first)
    if not with_graph:
        del tensors["_CHECKPOINTABLE_OBJECT_GRAPH"]
    tf.write_bundle(tmp_path / "ckpt-7", tensors)
    averaged = import_into(tmp_path / "ckpt-7", tmp_path / "ema", use_ema=True, classifier_after=official.classifier_after)
    check_same(official, tmp_path / "ema", averaged)
    assert averaged.ignored == {"weights before averaging": len(official.variables)}
    plain = import_into(tmp_path / "ckpt-7", tmp_path / "plain", classifier_after=official.classifier_after)
    assert plain.ignored == {"EMA copies": len(official.variables)}
    ours = load_checkpoint(tmp_path / "plain" / "checkpoint").weights
    torch.testing.assert_close(ours["body.linear.bias"], official.linear.bias + 1)


def test_tf2_averages_of_a_momentum_encoder(tf: Any, tmp_path: Path) -> None:
    official = tf.network(depth=18, classifier_after=0)
    tf.write_bundle(tmp_path / "ckpt-7", tf2_with_second_root(tf, official, "ema_model", True, left_out="supervised_head"))
    found = import_into(tmp_path / "ckpt-7", tmp_path / "out", use_ema=True)
    assert (found.kind, found.taken) == ("pretrained", "pretrained")
    check_pretrained(official, tmp_path / "out", offset=0)


def test_an_average_alone_is_the_network(tf: Any, tmp_path: Path) -> None:
    official = tf.network(depth=18)
    tensors = tf2_with_second_root(tf, official, "ema_model", True)
    del tensors["_CHECKPOINTABLE_OBJECT_GRAPH"]
    tf.write_bundle(tmp_path / "ckpt-7", {name: value for name, value in tensors.items() if not name.startswith("model/")})
    found = import_into(tmp_path / "ckpt-7", tmp_path / "out", classifier_after=1)
    check_same(official, tmp_path / "out", found)


def test_tf2_averages_as_slots(tf: Any, tmp_path: Path) -> None:
    """As MovingAverage of TensorFlow Addons keeps them: of what was trained, here the backbone, one head layer, and the classifier."""
    official = tf.network(depth=18)
    trained = [one for one in official.variables if "moving" not in one.path and "nl_1" not in one.tf1 and "nl_2" not in one.tf1]
    tensors = tf.tf2_tensors(official, slots=lambda path: path in [one.path for one in trained])
    for one in trained:
        tensors[f"{one.path}/.OPTIMIZER_SLOT/optimizer/average/.ATTRIBUTES/VARIABLE_VALUE"] = one.value
        tensors[f"{one.path}/.ATTRIBUTES/VARIABLE_VALUE"] = one.value + 1
    tf.write_bundle(tmp_path / "ckpt-7", tensors)
    found = import_into(tmp_path / "ckpt-7", tmp_path / "ema", use_ema=True)
    check_same(official, tmp_path / "ema", found)
    assert found.ignored["weights before averaging"] == found.ignored["optimiser slots"] == len(trained)
    assert (found.kind, found.classifier_after) == ("fine-tuned", 1)
    assert import_into(tmp_path / "ckpt-7", tmp_path / "plain").ignored["EMA copies"] == len(trained)


def test_averages_that_are_not_there(tf: Any, tmp_path: Path) -> None:
    official = tf.network(depth=18)
    tf.write_bundle(tmp_path / "m", official.tf1())
    with pytest.raises(CheckpointError, match="holds no EMA copies"):
        import_into(tmp_path / "m", tmp_path / "out", use_ema=True)
    tf.write_bundle(tmp_path / "m", official.tf1() | {"ema_model/base_model/conv2d/kernel": official.tf1()["base_model/conv2d/kernel"]})
    with pytest.raises(CheckpointError, match=r"EMA copies of some weights only .*missing: base_model/batch_normalization/beta"):
        import_into(tmp_path / "m", tmp_path / "out", use_ema=True)


def place_of(path: Path, tmp_path: Path) -> tuple[str, int | None, bool]:
    found = import_into(path, tmp_path / "out")
    return found.kind, found.classifier_after, "that is a guess" in found.describe()


@pytest.mark.parametrize(("step", "expected"), [(751, 1), (3754, 1), (37_535, 0), (28_151, 0)])
@pytest.mark.parametrize("num_classes", [1000, 5])
def test_the_step_names_the_published_runs(tf: Any, tmp_path: Path, step: int, expected: int, num_classes: int) -> None:
    """They have the 1000 classes of ImageNet; of another run the step is a guess."""
    official = tf.network(depth=18, num_classes=num_classes)
    tensors = with_slots(official.tf1(), lambda name: "head_contrastive" not in name)  # TF1 trains no head layer
    tf.write_bundle(tmp_path / "m", tensors | {"global_step": np.array(step)})
    assert place_of(tmp_path / "m", tmp_path) == ("fine-tuned", expected, num_classes != 1000)


def test_a_guess_is_called_one(tf: Any, tmp_path: Path) -> None:
    tf.write_bundle(tmp_path / "m", tf.network(depth=18).tf1() | {"global_step": np.array(999)})
    assert place_of(tmp_path / "m", tmp_path) == ("unknown", 0, True)
    assert (tmp_path / "out" / "pretrained").is_dir()  # nothing tells that it is not one
    said = import_into(tmp_path / "m", tmp_path / "again").describe()
    assert said.startswith("pretrained or fine-tuned SimCLR network (tf1, step 999)")
    assert "nothing tells pretraining from fine-tuning here: both" in said


def named(tf: Any, tmp_path: Path, path: str, step: int = 999, **network: Any) -> Path:
    """A checkpoint that says nothing but by its name; the numbers of pytest's own folders are out of sight."""
    prefix = tmp_path / "a" / "b" / "c" / path
    tf.write_bundle(prefix, tf.network(depth=18, **network).tf1() | {"global_step": np.array(step)})
    return prefix


@pytest.mark.parametrize(
    ("folder", "after"),
    [
        ("finetuned_1pct/r50_1x_sk0", 1),
        ("finetuned_10pct/r50_1x_sk0", 1),
        ("finetuned_100pct/r50_1x_sk0", 0),
        ("supervised/r50_1x_sk0", 0),
        ("runs/tf2_r18_ft1", 1),
        ("runs/tf2_r18_sk0_ft2", 2),
        ("runs/r18_ft-1", 3),
        ("10pct/ft0", 0),
        ("runs/ft100pct", 0),
    ],
)
def test_the_names_of_the_published_folders_are_a_better_guess(tf: Any, tmp_path: Path, folder: str, after: int) -> None:
    prefix = named(tf, tmp_path, f"{folder}/model.ckpt-999", embedding_dim=32)
    assert place_of(prefix, tmp_path) == ("fine-tuned", after, True)
    assert (tmp_path / "out" / "pretrained").is_dir()  # it is but a guess


@pytest.mark.parametrize("folder", ["draft1/r50", "r50/unsupervised", "self_supervised/r50", "pretrained_models/r50", "nonpretrained/r50"])
def test_names_that_say_nothing(tf: Any, tmp_path: Path, folder: str) -> None:
    assert place_of(named(tf, tmp_path, f"{folder}/model.ckpt-999"), tmp_path) == ("unknown", 0, True)


@pytest.mark.parametrize(
    ("path", "step", "after", "is_guess"),
    [
        ("tf2_r18_sk0_ft0/ckpt-3754", 3754, 0, True),
        ("tf2_r18_sk0_ft2/ckpt-3754", 3754, 2, True),
        ("tf2_r18_sk0_ft2/ckpt-751", 751, 2, True),
        ("finetuned_100pct/r18/model.ckpt-751", 751, 0, True),
        ("r18_ft1/ckpt-3754", 3754, 1, False),
        ("finetuned_1pct/r18/model.ckpt-751", 751, 1, False),
        ("finetuned/r18/ckpt-751", 751, 1, True),
    ],
)
def test_where_names_and_step_disagree_the_names_are_believed(
    tf: Any, tmp_path: Path, path: str, step: int, after: int, is_guess: bool
) -> None:
    assert place_of(named(tf, tmp_path, path, step), tmp_path) == ("fine-tuned", after, is_guess)


@pytest.mark.parametrize("path", ["pretrained/r18_1x_sk0/model.ckpt-1000", "tf1_r18_sk0_pretrain/ckpt-20", "runs/r18_pretrained.ckpt-20"])
def test_the_name_tells_pretraining_where_nothing_else_does(tf: Any, tmp_path: Path, path: str) -> None:
    found = import_into(named(tf, tmp_path, path, 1000, classifier_after=0), tmp_path / "out")
    assert (found.kind, found.taken, found.classifier_after) == ("pretrained", "pretrained", 0)
    assert "tells pretraining from fine-tuning here, so that is a guess: both" in found.describe()
    assert load_classifier(tmp_path / "out" / "checkpoint").card.origin["looked_on"] is True
    own = import_into(named(tf, tmp_path, path, 1000), tmp_path / "own", class_names=["a", "b"])
    assert "so that is a guess" in own.describe()
    tuned = import_into(named(tf, tmp_path, path, 751), tmp_path / "tuned")
    assert (tuned.kind, tuned.classifier_after) == ("fine-tuned", 1)  # the step of a published run is said in the file


@pytest.mark.parametrize(
    ("path", "missing"),
    [
        ("finetuned_1pct/r18/hub/751", "by step 751: fine-tuned with 1 % of the labels, it was trained on head layer 1"),
        ("r18/hub/3754", "by step 3754: fine-tuned with 10 % of the labels, it was trained on head layer 1"),
        ("finetuned_10pct/r18/hub", "by the name finetuned_10pct, it was trained on head layer 1"),
        ("finetuned_100pct/r18/hub/37535", ""),
        ("supervised/r18/hub", ""),
    ],
)
def test_a_hub_module_lacks_the_head_on_which_its_classifier_was_trained(tf: Any, tmp_path: Path, path: str, missing: str) -> None:
    folder = tmp_path / path
    tf.write_bundle(folder / "variables" / "variables", tf.network(depth=18, num_head_layers=0, classifier_after=0).tf1())
    (folder / "saved_model.pb").write_bytes(b"")
    found = import_into(folder, tmp_path / "out")
    assert (found.kind, found.classifier_after) == ("fine-tuned", 0)
    assert missing in found.describe()
    assert ("import the training checkpoint" in found.describe()) == bool(missing)
    assert "training checkpoint" not in import_into(folder, tmp_path / "said", classifier_after=0).describe()


@pytest.mark.parametrize(
    ("trained", "expected"),
    [
        (lambda path: "linear_layers/1" not in path and "linear_layers/2" not in path, ("fine-tuned", 1, False)),
        (lambda path: "linear_layers/2" not in path, ("fine-tuned", 2, False)),
        (lambda path: "linear_layers/" not in path, ("fine-tuned", 0, False)),
        (lambda path: "supervised" in path, ("fine-tuned", 0, False)),
        (lambda path: True, ("pretrained", 0, False)),
    ],
)
def test_tf2_slots_tell_what_was_trained(tf: Any, tmp_path: Path, trained: Callable[[str], bool], expected: tuple[str, int, bool]) -> None:
    tf.write_bundle(tmp_path / "ckpt-3754", tf.tf2_tensors(tf.network(depth=18), step=3754, slots=trained))
    assert place_of(tmp_path / "ckpt-3754", tmp_path) == expected


def test_slots_of_everything_where_the_output_fits_too(tf: Any, tmp_path: Path) -> None:
    official = tf.network(depth=18, embedding_dim=32, classifier_after=3)
    tf.write_bundle(tmp_path / "ckpt-7", tf.tf2_tensors(official, slots=lambda path: True))
    found = import_into(tmp_path / "ckpt-7", tmp_path / "out")
    assert (found.kind, found.classifier_after) == ("pretrained", 0)
    assert "fine-tuning from the head's output (classifier_after -1, take: classifier) would have left the same slots" in found.describe()
    other = import_into(tmp_path / "ckpt-7", tmp_path / "other", classifier_after=-1, take="classifier")
    check_same(official, tmp_path / "other", other)


@pytest.mark.parametrize("use_ema", [False, True])
def test_slots_in_which_nothing_has_arrived(tf: Any, tmp_path: Path, use_ema: bool) -> None:
    official = tf.network(depth=18)
    tensors, names, keys = tf.tf2_tensors(official), {}, {}
    trained = [one for one in official.variables if "moving" not in one.path]
    for number, one in enumerate(trained):  # Keras since 2.11: slots of everything, in one list, told apart by their full names
        path = f"optimizer/_variables/{number}"
        arrived = "nl_1" not in one.full_name and "nl_2" not in one.full_name
        tensors[f"{path}/.ATTRIBUTES/VARIABLE_VALUE"] = np.full_like(one.value, 0.1 if arrived else 0)
        names[path], keys[path] = f"SGD/m/{one.full_name}", f"{path}/.ATTRIBUTES/VARIABLE_VALUE"
        if use_ema:
            path = f"optimizer/_variables/{number + len(trained)}"
            tensors[f"{path}/.ATTRIBUTES/VARIABLE_VALUE"] = one.value
            tensors[f"{one.path}/.ATTRIBUTES/VARIABLE_VALUE"] = one.value + 1
            names[path], keys[path] = f"SGD/average/{one.full_name}", f"{path}/.ATTRIBUTES/VARIABLE_VALUE"
    for one in official.variables:
        names[one.path], keys[one.path] = one.full_name, f"{one.path}/.ATTRIBUTES/VARIABLE_VALUE"
    tensors["_CHECKPOINTABLE_OBJECT_GRAPH"] = tf.object_graph(keys, names)
    tf.write_bundle(tmp_path / "ckpt-2", tensors)
    assert place_of(tmp_path / "ckpt-2", tmp_path) == ("fine-tuned", 1, False)
    if use_ema:
        check_same(official, tmp_path / "ema", import_into(tmp_path / "ckpt-2", tmp_path / "ema", use_ema=True))


def test_averages_do_not_make_it_pretraining(tf: Any, tmp_path: Path) -> None:
    tensors = tf.network(depth=18).tf1()
    averages = {f"{name}/ExponentialMovingAverage": value for name, value in tensors.items()}
    slots = with_slots(tensors, lambda name: "head_contrastive" not in name)
    tf.write_bundle(tmp_path / "m", averages | slots | {"global_step": np.array(751)})
    assert place_of(tmp_path / "m", tmp_path) == ("fine-tuned", 1, True)
    tf.write_bundle(tmp_path / "m", tensors | {f"ema_model/{name}": value for name, value in tensors.items()})
    assert place_of(tmp_path / "m", tmp_path) == ("pretrained", 0, False)


def test_flags_of_the_run_tell(tf: Any, tmp_path: Path) -> None:
    tf.write_bundle(tmp_path / "run" / "model.ckpt-751", tf.network(depth=18).tf1())
    flags = tmp_path / "run" / "flags.json"
    flags.write_text(json.dumps({"train_mode": "finetune", "ft_proj_selector": 2}))
    assert place_of(tmp_path / "run", tmp_path) == ("fine-tuned", 2, False)
    flags.write_text(json.dumps({"train_mode": "pretrain", "ft_proj_selector": 0}))
    assert place_of(tmp_path / "run", tmp_path) == ("pretrained", 0, False)
    flags.write_text("{")
    assert place_of(tmp_path / "run", tmp_path) == ("fine-tuned", 1, True)


def computation(layers: int, stop: bool) -> list[tuple[str, str, tuple[str, ...]]]:
    """The nodes of the official graph that matter, and some that must not."""
    nodes = [
        ("image", "Placeholder", ()),
        ("base_model/conv2d/Conv2D", "Conv2D", ("image", "base_model/conv2d/kernel/read")),
        ("base_model/final_avg_pool", "Identity", ("base_model/conv2d/Conv2D:0", "^ordered")),
    ]
    last = "base_model/final_avg_pool"
    for j in range(3):
        scope = f"head_contrastive/nl_{j}/dense"
        nodes.append((f"{scope}/MatMul", "MatMul", (last if j < layers else "base_model/final_avg_pool", f"{scope}/kernel/read")))
        nodes.append((f"{scope}/Relu", "Relu", (f"{scope}/MatMul:product:0",)))
        last = f"{scope}/Relu" if j < layers else last
    if stop:
        nodes.append(("StopGradient", "StopGradient", (last,)))
        last = "StopGradient"
    classifier = "head_supervised/linear_layer/dense"
    nodes.append(("between", "Identity", (last,)))
    nodes.append((f"{classifier}/MatMul", "MatMul", ("between:output:0", f"{classifier}/kernel/read")))
    nodes.append((f"gradients/{classifier}/MatMul_grad/MatMul", "MatMul", (f"{classifier}/MatMul", "image")))
    return nodes


@pytest.mark.parametrize(("layers", "stop"), [(0, False), (1, False), (2, False), (0, True)])
@pytest.mark.parametrize("form", ["meta", "saved_model", "function"])
def test_the_saved_computation_tells(tf: Any, tmp_path: Path, layers: int, stop: bool, form: str) -> None:
    official = tf.network(depth=18)
    graph = tf.proto(2, tf.graph_def(computation(layers, stop), function=form == "function"))
    if form == "meta":
        tf.write_bundle(tmp_path / "model.ckpt-751", official.tf1())
        (tmp_path / "model.ckpt-751.meta").write_bytes(graph)
        path = tmp_path / "model.ckpt-751"
    else:  # a TF1 hub module has a saved_model.pb too
        path = tmp_path / "751"
        tf.write_bundle(path / "variables" / "variables", official.tf1())
        (path / "saved_model.pb").write_bytes(tf.proto(1, 1) + tf.proto(2, graph))
    assert place_of(path, tmp_path) == ("pretrained" if stop else "fine-tuned", layers, False)


def test_a_damaged_computation(tf: Any, tmp_path: Path) -> None:
    tf.write_bundle(tmp_path / "m-1", tf.network(depth=18).tf1())
    (tmp_path / "m-1.meta").write_bytes(tf.proto(2, b"\x0a\xff"))
    with pytest.raises(CheckpointError, match=r"m-1\.meta is damaged"):
        import_into(tmp_path / "m-1", tmp_path / "out")


def test_a_pool_in_the_computation_tells_resnet_d(tf: Any, tmp_path: Path) -> None:
    official = tf.network(depth=18, stem="cifar", sk=0.0625, classifier_after=1)
    folder = tmp_path / "m"
    tf.write_bundle(folder / "variables" / "variables", tf.saved_model_tensors(official, structure=False))
    nodes = [*computation(1, False), ("base_model/pool", "AvgPool", ("image",))]
    (folder / "saved_model.pb").write_bytes(tf.proto(2, tf.proto(2, tf.graph_def(nodes, function=True))))
    check_same(official, tmp_path / "out", import_into(folder, tmp_path / "out"))


@pytest.fixture
def written(tf: Any, tmp_path: Path) -> Path:
    tf.write_bundle(tmp_path / "run" / "model.ckpt-751", tf.network(depth=18).tf1())
    return tmp_path / "run"


def test_every_way_to_name_a_checkpoint(written: Path) -> None:
    prefix = written / "model.ckpt-751"
    (written / "checkpoint").write_text('model_checkpoint_path: "/elsewhere/model.ckpt-751"\n')
    for path in ("model.ckpt-751", "model.ckpt-751.index", "model.ckpt-751.data-00000-of-00001", "checkpoint", ""):
        found = find_checkpoint(written / path)
        assert (found.prefix, found.step) == (prefix, 751)
    shutil.copy(f"{prefix}.index", written / "model.ckpt-9.index")
    assert find_checkpoint(written).prefix == prefix
    (written / "checkpoint").unlink()
    with pytest.raises(CheckpointError, match=r"of \.index files several: model\.ckpt-751\.index, model\.ckpt-9\.index; give"):
        find_checkpoint(written)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no `checkpoint` file, no saved_model\.pb, and of \.index files none; give a prefix"):
        find_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"there is no model\.ckpt-1\.index; give"):
        find_checkpoint(tmp_path / "model.ckpt-1")
    (tmp_path / "old.ckpt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="format V1"):
        find_checkpoint(tmp_path / "old.ckpt")
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "model.ckpt-3"')
    with pytest.raises(CheckpointError, match=r"names model\.ckpt-3, but there is no model\.ckpt-3\.index beside it"):
        find_checkpoint(tmp_path)
    (tmp_path / "checkpoint").write_text("nothing")
    with pytest.raises(CheckpointError, match="names no model_checkpoint_path"):
        find_checkpoint(tmp_path)
    (tmp_path / "saved_model.pb").write_bytes(b"")
    with pytest.raises(CheckpointError, match="a SavedModel without weights"):
        find_checkpoint(tmp_path)


def refused(tf: Any, tmp_path: Path, tensors: dict[str, Any], **more: Any) -> str:
    """The one line with which a checkpoint is refused; nothing is written."""
    tf.write_bundle(tmp_path / "m", tensors)
    with pytest.raises(BadInput) as caught:
        import_into(tmp_path / "m", tmp_path / "out", **more)
    assert not (tmp_path / "out").exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "base_model/conv2d_7/kernel",
        "base_model/conv2d_20/kernel",
        "base_model/conv2d/kernel",
        "base_model/batch_normalization_20/beta",
        "head_contrastive/nl_0/dense/kernel",
        "head_contrastive/nl_1/batch_normalization/beta",
        "head_contrastive/nl_2/batch_normalization/gamma",
        "head_supervised/linear_layer/dense/bias",
        "head_supervised/linear_layer/dense/kernel",
    ],
)
def test_a_missing_tensor_is_named(tf: Any, tmp_path: Path, name: str) -> None:
    tensors = tf.network(depth=18).tf1()
    del tensors[name]
    assert f"missing: {name}" in refused(tf, tmp_path, tensors)


@pytest.mark.parametrize(
    "name",
    [
        "base_model/conv2d_21/kernel",
        "base_model/batch_normalization_21/gamma",
        "base_model/conv2d_3/bias",
        "head_contrastive/nl_2/batch_normalization/beta",
        "resnet_v1_50/conv1/weights",
        "head_contrastive/nl_0/dense/kernel/Extra",
    ],
)
def test_a_tensor_too_many_is_named(tf: Any, tmp_path: Path, name: str) -> None:
    tensors = tf.network(depth=18).tf1() | {name: np.zeros((3, 3, 4, 4), np.float32)}
    assert f"left over: {name}" in refused(tf, tmp_path, tensors)


def test_a_tf2_tensor_that_its_graph_lists_is_missing_or_too_many(tf: Any, tmp_path: Path) -> None:
    tensors = tf.tf2_tensors(tf.network(depth=18))
    name = next(key for key in tensors if "block_groups/2/layers/0/shortcut_layers/0/conv2d/kernel" in key)
    value = tensors.pop(name)
    assert f"missing: {name}" in refused(tf, tmp_path, tensors)
    extra = "model/se_layer/kernel/.ATTRIBUTES/VARIABLE_VALUE"
    assert f"left over: {extra}" in refused(tf, tmp_path, tensors | {name: value, extra: value})


def test_a_tensor_of_another_shape_is_named(tf: Any, tmp_path: Path) -> None:
    tensors = tf.network(depth=18).tf1()
    tensors["base_model/conv2d_5/kernel"] = np.zeros((3, 3, 4, 5), np.float32)
    assert "other shape: base_model/conv2d_5/kernel" in refused(tf, tmp_path, tensors)
    tensors["base_model/conv2d_5/kernel"] = np.zeros((5, 5, 4, 4), np.float32)
    assert "other kernel size: base_model/conv2d_5/kernel" in refused(tf, tmp_path, tensors)


def test_another_network(tf: Any, tmp_path: Path) -> None:
    names = [f"resnet_v2_50/block{i}/unit_1/weights" for i in range(30)]
    line = refused(tf, tmp_path, {name: np.zeros((1, 1, 2, 2), np.float32) for name in names})
    assert "not a SimCLR network" in line
    assert "left over: resnet_v2_50/block0/unit_1/weights, " in line
    assert "(30 in all)" in line


def test_a_backbone_alone(tf: Any, tmp_path: Path) -> None:
    assert "holds a backbone alone" in refused(tf, tmp_path, tf.network(depth=18, num_head_layers=0, classifier_after=None).tf1())


def test_widths_that_no_ratio_gives(tf: Any, tmp_path: Path) -> None:
    official = tf.network(depth=50, sk=0.8, width=0.125)
    tensors = official.tf1()
    name = next(name for name, value in tensors.items() if value.shape == (1, 1, 64, 51))
    tensors[name] = np.ascontiguousarray(tensors[name][..., :40])
    assert "no sk_ratio gives the squeezed widths of its selective kernels (32 of 8, 32 of 16, 32 of 32, 40 of 64, 51 of 64)" in refused(
        tf, tmp_path, tensors
    )


def test_a_width_that_leaves_the_first_group_nothing(tf: Any, tmp_path: Path) -> None:
    tensors = tf.network(depth=18).tf1()
    tensors["base_model/conv2d_20/kernel"] = np.zeros((3, 3, 4, 4), np.float32)
    assert "give at least 1/64" in refused(tf, tmp_path, tensors)


def test_class_lists(tf: Any, tmp_path: Path) -> None:
    tensors = tf.network(depth=18).tf1()
    assert "4 class names are given, and the classifier in" in refused(tf, tmp_path, tensors, class_names=list("abcd"))
    assert "has 5 classes" in refused(tf, tmp_path, tensors, class_names=list("abcdef"))
    import_into(tmp_path / "m", tmp_path / "named", class_names=list("abcde"))
    assert load_classifier(tmp_path / "named" / "checkpoint").card.class_names == tuple("abcde")


def test_a_classifier_that_does_not_fit(tf: Any, tmp_path: Path) -> None:
    tensors = tf.network(depth=18).tf1()
    line = refused(tf, tmp_path, tensors, classifier_after=3)
    assert "classifier_after 3 does not fit" in line
    assert "takes 32 features, as they come after head layers 0, 1, 2" in line
    tensors["head_supervised/linear_layer/dense/kernel"] = np.zeros((7, 5), np.float32)
    assert "takes 7 features, and no layer gives so many" in refused(tf, tmp_path, tensors)


def test_the_output_counts_from_the_end(tf: Any, tmp_path: Path) -> None:
    official = tf.network(depth=18, embedding_dim=32, classifier_after=3)
    tf.write_bundle(tmp_path / "m", official.tf1())
    found = import_into(tmp_path / "m", tmp_path / "out", classifier_after=-1)
    assert found.classifier_after == 3
    check_same(official, tmp_path / "out", found)


def test_an_image_that_is_too_small(tf: Any, tmp_path: Path) -> None:
    tf.write_bundle(tmp_path / "m", tf.network(depth=18).tf1())
    with pytest.raises(ConfigError, match="image_size 16 is smaller"):
        import_into(tmp_path / "m", tmp_path / "out", size=16)


def test_damage_writes_nothing(tf: Any, tmp_path: Path) -> None:
    tf.write_bundle(tmp_path / "m", tf.network(depth=18).tf1())
    data = tmp_path / "m.data-00000-of-00001"
    content = bytearray(data.read_bytes())
    content[-3] ^= 1
    data.write_bytes(content)
    with pytest.raises(CheckpointError, match="is altered"):
        import_into(tmp_path / "m", tmp_path / "out")
    assert not (tmp_path / "out").exists()
