"""From the body of a REST request to crops: a single image file, several in JSON, or ready crops in the binary form.

Flow: HTTP body -> bytes, at most so many -> decode and centre-crop in threads -> uint8 crops, and a list of the images that cannot be used.
Unit of data: one request of B images, of which G are good. Nothing here blocks the event loop.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
from fastapi import Request
from numpy.typing import NDArray
from pydantic import ValidationError

from distill.crops import center_crop, decode_image
from distill.errors import ImageError, RequestRefused
from distill.teacher_info import Preprocessing
from distill.wire import CROPS_MEDIA_TYPE, ItemError, decode_crops
from teacher_server.problems import Problem
from teacher_server.schemas import ImagesRequest
from teacher_server.settings import ServerSettings

IMAGE_MEDIA_TYPES = ("image/jpeg", "image/png", "image/webp")
JSON_MEDIA_TYPE = "application/json"


@dataclass(frozen=True)
class Intake:
    """The images of one request: uint8 `crops_GHWC` of the good ones, their `positions_G` in it, and the `errors` of the others."""

    num_images: int
    crops_GHWC: NDArray[np.uint8]
    positions_G: NDArray[np.intp]
    errors: tuple[ItemError, ...]


async def take_in(request: Request, preprocessing: Preprocessing, settings: ServerSettings, threads: Executor) -> Intake:
    """Read and decode one request.

    Raises:
        Problem: 413 body too large, 415 unknown media type.
        ImageError: the body is one image, and a bad one.
        RequestRefused: malformed JSON or crops, too many images, or not one usable image among several.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type not in (*IMAGE_MEDIA_TYPES, JSON_MEDIA_TYPE, CROPS_MEDIA_TYPE):
        known = ", ".join((*IMAGE_MEDIA_TYPES, JSON_MEDIA_TYPE, CROPS_MEDIA_TYPE))
        raise Problem(415, "unsupported_media_type", f"content type {media_type[:100] or 'none'!r} is not one of {known}")
    body = await read_body(request, settings.max_body_bytes)
    if media_type == CROPS_MEDIA_TYPE:
        return _ready_crops(body, settings.max_batch)
    loop = asyncio.get_running_loop()
    if media_type in IMAGE_MEDIA_TYPES:
        crop = await loop.run_in_executor(threads, _one_crop, body, preprocessing, settings.max_image_pixels)
        return Intake(1, crop[None], np.zeros(1, np.intp), ())
    texts = await loop.run_in_executor(threads, _image_texts, body, settings.max_batch)
    jobs = [
        loop.run_in_executor(threads, _crop_or_error, text, i, preprocessing, settings.max_image_pixels) for i, text in enumerate(texts)
    ]
    return _sorted_out(await asyncio.gather(*jobs))


async def read_body(request: Request, limit: int) -> bytes:
    """The body, refused as soon as it is known to be over `limit` bytes: a client's Content-Length is believed only if it is too large."""
    announced = request.headers.get("content-length", "")
    too_large = Problem(413, "too_large", f"the body is over {limit} bytes (server.max_body_bytes); send fewer images at once")
    if announced.isdigit() and int(announced) > limit:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise too_large
    return bytes(body)


def _ready_crops(body: bytes, max_batch: int) -> Intake:
    crops_BHWC = decode_crops(body)
    _check_count(len(crops_BHWC), max_batch)
    return Intake(len(crops_BHWC), crops_BHWC, np.arange(len(crops_BHWC)), ())


def _image_texts(body: bytes, max_batch: int) -> list[str]:
    try:
        texts = ImagesRequest.model_validate_json(body).images
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RequestRefused(f'the JSON body must be {{"images": [base64, ...]}}; {where + ": " if where else ""}{first["msg"]}') from error
    _check_count(len(texts), max_batch)
    return texts


def _check_count(num_images: int, max_batch: int) -> None:
    if not 1 <= num_images <= max_batch:
        raise RequestRefused(f"a request holds 1 to {max_batch} images (server.max_batch), got {num_images}")


def _crop_or_error(text: str, index: int, preprocessing: Preprocessing, max_pixels: int) -> NDArray[np.uint8] | ItemError:
    try:
        return _one_crop(base64.b64decode(text, validate=True), preprocessing, max_pixels)
    except (binascii.Error, ValueError):  # ValueError: characters beyond ASCII
        return ItemError(index=index, code="bad_base64", message="this is not base64")
    except ImageError as error:
        return ItemError(index=index, code="bad_image", message=error.reason)


def _one_crop(data: bytes, preprocessing: Preprocessing, max_pixels: int) -> NDArray[np.uint8]:
    return center_crop(decode_image(data, max_pixels), preprocessing.image_size, preprocessing.crop_ratio)


def _sorted_out(results: list[NDArray[np.uint8] | ItemError]) -> Intake:
    errors = tuple(result for result in results if isinstance(result, ItemError))
    good = [(position, result) for position, result in enumerate(results) if not isinstance(result, ItemError)]
    if not good:  # an answer without a single label is not a success
        raise RequestRefused(f"none of the {len(results)} images can be used; the first: {errors[0].message}")
    return Intake(len(results), np.stack([crop for _, crop in good]), np.array([position for position, _ in good], np.intp), errors)
