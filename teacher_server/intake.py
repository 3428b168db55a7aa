"""From the body of a REST request to crops: one image file, several in a form or in JSON, or ready crops in the binary form.

Flow: HTTP body -> `receive`: the images are counted, nothing is decoded yet -> `make_crops`: threads decode and cut -> uint8 crops, and a
list of the images that cannot be used.
Unit of data: one request of B images, of which G are good. Nothing here blocks the event loop.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from functools import partial

import numpy as np
from fastapi import Request
from numpy.typing import NDArray
from pydantic import ValidationError

from distill.crops import decode_image
from distill.decoding import num_pixels
from distill.errors import ImageError, RequestRefused
from distill.teacher_info import Preprocessing, TeacherInfo
from distill.wire import CROPS_MEDIA_TYPE, CropPolicy, ItemError, decode_crops
from teacher_server.backend import check_crops
from teacher_server.bodies import HeldBody, read_body, read_files, too_many_images
from teacher_server.decoding_pool import DecodingPool, PixelBudget
from teacher_server.problems import Problem
from teacher_server.quotas import TenantUsage
from teacher_server.schemas import ImagesRequest
from teacher_server.settings import ServerSettings

IMAGE_MEDIA_TYPES = ("image/jpeg", "image/png", "image/webp")
FORM_MEDIA_TYPE = "multipart/form-data"
JSON_MEDIA_TYPE = "application/json"
MEDIA_TYPES = (*IMAGE_MEDIA_TYPES, FORM_MEDIA_TYPE, JSON_MEDIA_TYPE, CROPS_MEDIA_TYPE)


@dataclass(frozen=True)
class Submission:
    """What a client sent: either `files` (encoded images; in JSON, their base64 text) or uint8 `crops_BHWC`."""

    files: list[bytes | str]
    crops_BHWC: NDArray[np.uint8] | None = None
    single: bool = False
    """The body is one image itself, so a bad image is a bad request."""

    @property
    def num_images(self) -> int:
        """B."""
        return len(self.files) if self.crops_BHWC is None else len(self.crops_BHWC)


@dataclass(frozen=True)
class Intake:
    """The images of one request: uint8 `crops_GHWC` of the good ones, their `positions_G` in it, and the `errors` of the others."""

    num_images: int
    crops_GHWC: NDArray[np.uint8]
    positions_G: NDArray[np.intp]
    errors: tuple[ItemError, ...]
    policy: CropPolicy


class NothingUsable(Problem):
    """422: not one image of a request of `num_images` can be used."""

    def __init__(self, num_images: int, code: str, message: str, items: tuple[ItemError, ...] = ()) -> None:
        super().__init__(422, code, message, items=items)
        self.num_images = num_images


async def receive(request: Request, held: HeldBody, settings: ServerSettings, pool: DecodingPool) -> Submission:
    """Read one request to its end.

    Raises:
        Problem: 413 body too large or too many images, 415 unknown media type, 503 too many bodies in memory.
        RequestRefused: a malformed form, JSON or crops, or no image.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type not in MEDIA_TYPES:
        raise Problem(415, "unsupported_media_type", f"content type {media_type[:100] or 'none'!r} is not one of {', '.join(MEDIA_TYPES)}")
    if media_type in IMAGE_MEDIA_TYPES and settings.max_image_bytes < settings.max_body_bytes:
        return Submission([await read_body(request, settings.max_image_bytes, held, "max_image_bytes")], single=True)
    if media_type == FORM_MEDIA_TYPE:
        files: list[bytes | str] = [*await read_files(request, settings.max_body_bytes, held, settings.max_batch)]
        return _counted(Submission(files), settings.max_batch)
    body = await read_body(request, settings.max_body_bytes, held)
    if media_type == CROPS_MEDIA_TYPE:
        return _counted(Submission([], decode_crops(body)), settings.max_batch)
    if media_type == JSON_MEDIA_TYPE:
        return _counted(Submission(await pool.run(partial(_image_texts, body, settings.max_batch))), settings.max_batch)
    return Submission([body], single=True)


async def make_crops(
    sent: Submission, policy: CropPolicy | None, info: TeacherInfo, settings: ServerSettings, pool: DecodingPool, tenant: TenantUsage
) -> Intake:
    """The crops that the teacher is asked about.

    Raises:
        NothingUsable: 422 there is not one usable image.
        RequestRefused: ready crops of another size, or a policy that ready crops cannot have.
    """
    if sent.crops_BHWC is not None:
        if policy == "teacher":
            raise RequestRefused("crops in binary form are taken as they are; crop=teacher cuts image files")
        check_crops(sent.crops_BHWC, info)
        return Intake(sent.num_images, sent.crops_BHWC, np.arange(sent.num_images), (), "as-is")
    policy = policy or "teacher"
    results = await pool.map(tenant, partial(_crop_or_error, info.preprocessing, policy, settings, pool.pixels), sent.files)
    errors = tuple(result for result in results if isinstance(result, ItemError))
    good = [(position, result) for position, result in enumerate(results) if not isinstance(result, ItemError)]
    if good:
        positions_G = np.array([position for position, _ in good], np.intp)
        return Intake(len(results), np.stack([crop for _, crop in good]), positions_G, errors, policy)
    if sent.single:
        raise NothingUsable(1, errors[0].code, f"this image cannot be used: {errors[0].message}")
    # An answer without a single label is not a success.
    message = f"none of the {len(results)} images can be used; the first: {errors[0].message}"
    raise NothingUsable(len(results), "refused", message, items=errors)


def _counted(sent: Submission, max_batch: int) -> Submission:
    if sent.num_images > max_batch:
        raise too_many_images(max_batch)
    if sent.num_images < 1:
        raise RequestRefused(f"a request holds 1 to {max_batch} images (server.max_batch), got 0")
    return sent


def _image_texts(body: bytes, max_batch: int) -> list[bytes | str]:
    # Base64 has no comma, so nearly every comma ends an item; twice as many allow for `data:` URLs, which the item's own error names.
    # Counted before parsing: 32 MB of `1,1,1` would be 16 million objects, made while no other thread may run.
    if body.count(b",") > 2 * max_batch:
        raise too_many_images(max_batch)
    try:
        return [*ImagesRequest.model_validate_json(body).images]
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RequestRefused(
            f'the JSON body must be {{"images": [base64, ...]}}; {where + ": " if where else ""}{first["msg"]}'
        ) from None  # the validator's error holds the body


def _crop_or_error(
    preprocessing: Preprocessing, policy: CropPolicy, settings: ServerSettings, pixels: PixelBudget, index: int, file: bytes | str
) -> NDArray[np.uint8] | ItemError:
    """Runs in a thread. Never raises for what a client sent."""
    try:
        data = base64.b64decode(file, validate=True) if isinstance(file, str) else file
    except (binascii.Error, ValueError):  # ValueError: characters beyond ASCII
        return ItemError(index=index, code="bad_base64", message="this is not base64 without line breaks")
    if len(data) > settings.max_image_bytes:
        message = f"the image has {len(data)} bytes, over {settings.max_image_bytes} (server.max_image_bytes)"
        return ItemError(index=index, code="too_large", message=message)
    try:
        with pixels.hold(num_pixels(data)):
            return _crop(decode_image(data, settings.max_image_pixels), preprocessing, policy, index)
    except ImageError as error:
        return ItemError(index=index, code="bad_image", message=error.reason)


def _crop(pixels_HWC: NDArray[np.uint8], preprocessing: Preprocessing, policy: CropPolicy, index: int) -> NDArray[np.uint8] | ItemError:
    size = preprocessing.image_size
    if policy == "teacher":
        return preprocessing.evaluation_crop(pixels_HWC)
    height, width = pixels_HWC.shape[:2]
    if (height, width) == (size, size):
        return pixels_HWC
    message = f"the image is {height} x {width} pixels (height x width), a crop for this teacher {size} x {size}; crop=teacher cuts one"
    return ItemError(index=index, code="wrong_size", message=message)
