"""What REST clients of the gateway send and get, as JSON; FastAPI makes the OpenAPI document from it.

Unit of data: one request about one or more images. The binary bodies, for programs, are in distill/wire.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import FailFast, Field

from distill.config import Section
from distill.teacher_info import Preprocessing, TeacherInfo
from distill.wire import CropPolicy, ItemError, Kind


class SoftLabelsQuery(Section):
    """Query parameters of `POST /v1/soft-labels`. An unknown one is refused: a mistyped temperature must not give other labels."""

    temperature: float | None = Field(default=None, ge=1e-6, le=100)
    """Softmax temperature, at most 100. Default: the teacher's own. At the lowest one every soft label is a hard one; below it fp32 would
    not hold logits / temperature."""
    top_k: int | None = Field(default=None, ge=1)
    """Only the classes with the largest values, largest first. Default: all classes, in the order of their ids."""
    kind: Kind = Field(default="probs", alias="return")
    """`probs` (soft labels), `log_probs` (their natural logarithm) or `logits` (before softmax and temperature)."""
    names: bool = False
    """Add the class names: to each item in JSON, those of all classes to the header of a binary answer."""
    crop: CropPolicy | None = None
    """`teacher`: cut the teacher's own evaluation crop; the default for image files. `as-is`: the images are crops already, of exactly the
    teacher's size; binary crops always are."""
    model: str | None = None
    """Refuse to answer as any other model than this one."""


class ImagesRequest(Section):
    """Several images in one JSON body."""

    images: Annotated[list[str], FailFast()] = Field(min_length=1)
    """JPEG, PNG or WebP files, each in base64."""


class Failure(Section):
    """What went wrong."""

    code: str
    """Short, stable, for programs."""
    message: str
    """One line for a person."""


class RequestFailure(Failure):
    """Why a request failed."""

    retry_after_s: float | None = None
    """With 429 and 503: when to come back, in seconds, finer than the header Retry-After."""
    items: list[ItemError] | None = None
    """If not one image of several can be used: what is wrong with each."""


class ErrorBody(Section):
    """Body of every answer that is not 2xx."""

    error: RequestFailure
    """What went wrong."""


class LabelItem(Section):
    """The answer for one image: values, or an error if this image cannot be used."""

    class_ids: list[int] | None = None
    """Class ids of the values, with top_k; without it value i belongs to class i."""
    values: list[float] | None = None
    """Probabilities, log-probabilities or logits, to 7 significant digits."""
    class_names: list[str] | None = None
    """Names of the classes of the values, if asked for."""
    error: Failure | None = None
    """Why this image has no label."""


class SoftLabelsAnswer(Section):
    """Soft labels of one request, in the order of its images."""

    model: str
    """Name of the teacher."""
    version: int
    """Version of the teacher."""
    fingerprint: str
    """Names graph, weights, preprocessing and classes. Labels of different fingerprints do not belong together."""
    temperature: float
    """Temperature of the probabilities."""
    kind: Kind
    """What the values are."""
    crop: CropPolicy
    """Whether the teacher's own evaluation crop was cut from the images, or they were crops already."""
    items: list[LabelItem]
    """One per image. With status 207, at least one of them is an error."""


class ModelCard(Section):
    """One served teacher."""

    name: str
    """Name in REST paths."""
    version: int
    """Version that answers now."""
    fingerprint: str
    """See SoftLabelsAnswer."""
    class_names: tuple[str, ...]
    """Names of the K classes, in the order of their ids."""
    preprocessing: Preprocessing
    """What an image goes through."""
    default_temperature: float
    """Temperature used when a request names none."""

    precision: Literal["fp32", "fp16", "int8"]
    """What the graph computes in."""
    parity: dict[str, Any] | None = None
    """How far the served graph is from the network it was exported from, as the parity gate measured it. None: not known to this server."""

    @classmethod
    def of(cls, info: TeacherInfo, parity: dict[str, Any] | None = None) -> ModelCard:
        """The public description of a teacher."""
        known = {name: getattr(info, name) for name in cls.model_fields if name != "parity"}
        return cls(**known, parity=parity)


class ModelList(Section):
    """All served teachers."""

    models: list[ModelCard]
    """In no particular order."""


class Health(Section):
    """Answer of the health endpoints."""

    status: str
    """`ok`."""
