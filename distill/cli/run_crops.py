"""Real crops of a run's images, for whoever measures something on them: parity gates, calibration, edge files.

Shapes: N images, crops uint8 [N,S,S,3].
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from distill.cli.run import Run
from distill.errors import SourceError


def sample_crops(run: Run, count: int) -> tuple[npt.NDArray[np.uint8], list[str]]:
    """The evaluation crops of the first `count` usable unlabelled images, and their ids."""
    from distill.evaluation import evaluation_batches
    from distill.image_sets import open_unlabelled

    crops, ids = [], list[str]()
    for batch in evaluation_batches(open_unlabelled(run.file.data), run.file.data, run.rejections()):
        crops.append(batch.crops_VBHWC[0])
        ids += batch.image_ids
        if len(ids) >= count:
            break
    return np.concatenate(crops)[:count], ids[:count]


def crops_of_test_images(run: Run) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64] | None]:
    """The evaluation crops of the test images, and their labels where they have any.

    Raises:
        SourceError: some have a label and some have none.
    """
    from distill.evaluation import evaluation_batches
    from distill.image_sets import open_labelled
    from distill.loader import UNLABELLED

    batches = list(evaluation_batches(open_labelled(run.file.data.test, run.file.data), run.file.data, run.rejections()))
    crops, labels = np.concatenate([b.crops_VBHWC[0] for b in batches]), np.concatenate([b.labels_B for b in batches])
    num_missing = int((labels == UNLABELLED).sum())
    if 0 < num_missing < len(labels):
        raise SourceError(
            f"{run.file.data.test.path}: {num_missing} of {len(labels)} test images have no label; the export needs all of them, or none"
        )
    return crops, None if num_missing else labels
