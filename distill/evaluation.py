"""A network's logits on a whole set of images, through the evaluation crop."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch

from distill.crops import CropRecipe
from distill.data_settings import DataSettings
from distill.errors import SourceError
from distill.label_metrics import FloatArray, IntArray
from distill.loader import UNLABELLED, CropBatch, CropLoader, LoaderSettings
from distill.models.classifier import Classifier
from distill.rejections import RejectionLog
from distill.sources import Source

EVAL_BATCH = 256


def evaluation_batches(source: Source, data: DataSettings, rejections: RejectionLog) -> Iterator[CropBatch]:
    """Centre crops of every usable image in the source's own order, batch by batch."""
    recipe = CropRecipe(kind="center", image_size=data.image_size, crop_ratio=data.crop_ratio, interpolation=data.interpolation)
    settings = LoaderSettings(
        seed=0, global_batch=EVAL_BATCH, window_shards=1, drop_last=False, shuffle=False, num_threads=data.num_threads
    )
    yield from CropLoader(source, recipe, settings, lambda epoch: (0,), rejections).epoch(0)


def evaluate_on(
    predict: Callable[[npt.NDArray[np.uint8]], FloatArray], source: Source, data: DataSettings, rejections: RejectionLog
) -> tuple[FloatArray, IntArray]:
    """(logits float32 [N,K], labels int64 [N], `UNLABELLED` where there is none) of the source's images; `predict` is uint8 crops
    [B,H,W,3] -> logits [B,K]."""
    logits, labels = [], []
    for batch in evaluation_batches(source, data, rejections):
        logits.append(predict(batch.crops_VBHWC[0]))
        labels.append(batch.labels_B)
    return np.concatenate(logits), np.concatenate(labels)


def require_labels(labels_N: IntArray, data: DataSettings) -> IntArray:
    """The labels int64 [N] of the test images.

    Raises:
        SourceError: some are missing.
    """
    if num_missing := int((labels_N == UNLABELLED).sum()):
        raise SourceError(f"{data.test.path}: {num_missing} of {len(labels_N)} test images have no label; evaluation needs all of them")
    return labels_N


def network_logits(network: Classifier) -> Callable[[npt.NDArray[np.uint8]], FloatArray]:
    """The network as a function on numpy crops, in evaluation mode."""
    device = next(network.parameters()).device

    def predict(crops_BHWC: npt.NDArray[np.uint8]) -> FloatArray:
        network.eval()
        with torch.inference_mode():
            return network(torch.from_numpy(crops_BHWC).to(device)).cpu().numpy()

    return predict
