"""What a served teacher says of itself. It travels in the ONNX file, in Triton's model parameters and in every answer.

Unit of data: one `TeacherInfo` for one version of one teacher.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from distill.config import Section
from distill.crops import Interpolation, center_crop

METADATA_KEY = "distill.teacher"
"""Key of the JSON form in ONNX metadata properties and in Triton model parameters."""


CROPPING = {"crop_ratio", "interpolation"}
"""Fields of `Preprocessing` that say how the evaluation crop is cut; nothing that pretraining sees depends on them."""


class Preprocessing(Section):
    """The contract between an image and a network. Casting and normalising happen inside the network: crops travel as uint8 RGB."""

    image_size: int = Field(ge=1, le=4096)
    """Height and width, in pixels, of the crop that the network sees."""
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Mean of R, G, B on the scale 0 to 1, subtracted first."""
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Standard deviation of R, G, B on the scale 0 to 1, divided by next."""
    crop_ratio: float = Field(default=1.0, gt=0, le=1)
    """Evaluation crop: the shorter side is resized to image_size / crop_ratio, then the centre is cut."""
    interpolation: Interpolation = "bilinear"
    """Filter of that resize; it averages over the source when it shrinks."""

    def evaluation_crop(self, pixels_HWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """What the network sees of an image, uint8 RGB [S,S,3], S = image_size; see `center_crop`."""
        return center_crop(pixels_HWC, self.image_size, self.crop_ratio, self.interpolation)


class TeacherInfo(Section):
    """Name, version, fingerprint, classes and preprocessing of one served teacher."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    """Name of the model in the repository and in REST paths."""
    version: int = Field(default=1, ge=1)
    """Version of the model in the repository."""
    fingerprint: str = Field(pattern=r"^[0-9a-f]{64}$")
    """sha256 of graph, weights, preprocessing and class list. Labels of different fingerprints never mix."""
    class_names: tuple[str, ...] = Field(min_length=2)
    """Names of the K classes, in the order of the logits."""
    preprocessing: Preprocessing
    """What an image goes through before it is a crop."""
    default_temperature: float = Field(default=1.0, gt=0, le=100)
    """Temperature used when a request names none."""
    precision: Literal["fp32", "fp16", "int8"] = "fp32"
    """What the graph computes in. Crops, logits and soft labels have the same types in all three."""
    top_outputs: int | None = Field(default=None, ge=1)
    """R: the graph also gives the R largest logits of a crop and their class ids; none: it does not."""

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.class_names)
