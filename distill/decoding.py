"""encoded image -> pixels: the step before the crop. `distill.crops` hands `decode_image` on; import it from there.

Unit of data: one encoded image in, one uint8 RGB array [H,W,3] out. JPEG, PNG and WebP are decoded, everything else is refused by name:

    grey, palette, 1-bit     spread to RGB
    alpha, transparent key   laid on white: a cut-out product photograph keeps the background that it is shown on
    16-bit                   the high byte is kept, grey as well as colour: scaled, never clipped
    CMYK, YCCK               Pillow's plain conversion; Adobe's inverted values and true ones are told apart by the Adobe marker
    EXIF orientation         applied: the teacher and the student see the image upright
    animated                 the first frame
    colour profile           ignored, as in the usual ImageNet pipelines

Specifications: ITU T.81 (JPEG), PNG third edition, the WebP container, CIPA DC-008 (EXIF).
"""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, ImageChops, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from distill.errors import ImageError

# Pillow warns of each damaged EXIF tag, naming it, so that no warning is like another: a file of 780 kB gave 130,000 lines on the gateway's
# stderr. Once for the process, since `catch_warnings` is not safe among threads.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin$")

MAX_PIXELS = 50_000_000
"""Default limit of height x width: 150 MB as RGB. While it is decoded an image takes up to 15 bytes a pixel (RGBA, turned by EXIF)."""

_MOST_SCANS = 100
"""Of one JPEG. Progressive files hold about ten; every scan passes over all pixels, also one of no more than its header."""

_JPEG_SEGMENT = re.compile(rb"\xff([\xc0-\xcf\xd9-\xfe])")  # the marker of a scan or of what is followed by its length, and the end
_SOS, _EOI = 0xDA, 0xD9

_PLUGINS: dict[str, type[PngImageFile | WebPImageFile | JpegImageFile]] = {
    "JPEG": JpegImageFile,
    "PNG": PngImageFile,
    "WEBP": WebPImageFile,
}

_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    AttributeError,
    struct.error,
    zlib.error,
)
"""What Pillow's plugins may raise on damaged bytes."""

_NAMES_OF_FOREIGN_FORMATS: tuple[tuple[int, bytes, str], ...] = (
    (0, b"GIF8", "GIF"),
    (0, b"BM", "BMP"),
    (0, b"II*\x00", "TIFF"),
    (0, b"MM\x00*", "TIFF"),
    (4, b"ftypavi", "AVIF"),
    (4, b"ftyphe", "HEIC"),
    (4, b"ftypmif1", "HEIF"),
    (4, b"jP  ", "JPEG 2000"),
    (4, b"JXL ", "JPEG XL"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"%PDF", "PDF"),
    (0, b"<svg", "SVG"),
    (0, b"<?xml", "XML"),
)


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> npt.NDArray[np.uint8]:
    """Decode one JPEG, PNG or WebP.

    Args:
        data: the encoded file.
        max_pixels: largest height x width; the header is asked before anything is decoded, so a bomb costs nothing.

    Returns:
        uint8 RGB [H,W,3], upright, writable, of its own memory.

    Raises:
        ImageError: `empty file`, `not an image`, `unsupported format NAME`, `more than N pixels`, `more than N scans`, `truncated`,
            `damaged FORMAT`.
    """
    format_name = _format_of(data)
    width, height = _size_in_header(data, format_name)
    if width < 1 or height < 1:
        raise ImageError(f"damaged {format_name}")
    if width * height > max_pixels:
        raise ImageError(f"more than {max_pixels} pixels")
    if format_name == "JPEG":
        if _has_too_many_scans(data):
            raise ImageError(f"more than {_MOST_SCANS} scans")
        pixels_HWC = _decode_plain_jpeg(data)
        if pixels_HWC is not None:
            return pixels_HWC
    return _decode_with_pillow(data, format_name, (width, height))


def num_pixels(data: bytes) -> int:
    """Height x width as the header says; 0 where there is none to read, which `decode_image` refuses."""
    try:
        width, height = _size_in_header(data, _format_of(data))
    except ImageError:
        return 0
    return width * height


def _format_of(data: bytes) -> str:
    """`JPEG`, `PNG` or `WEBP` by the first bytes; a file's name is not evidence."""
    if data[:3] == b"\xff\xd8\xff":
        return "JPEG"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "PNG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if not data:
        raise ImageError("empty file")
    start = data[:16].lstrip()
    for offset, magic, name in _NAMES_OF_FOREIGN_FORMATS:
        if start[offset : offset + len(magic)] == magic:
            raise ImageError(f"unsupported format {name}")
    raise ImageError("not an image")


def _size_in_header(data: bytes, format_name: str) -> tuple[int, int]:
    """(width, height) as the header says, before Pillow or libwebp allocate anything."""
    try:
        if format_name == "JPEG":
            height, width, _, _ = simplejpeg.decode_jpeg_header(data, strict=False)
            return int(width), int(height)
        if format_name == "PNG":
            if data[12:16] != b"IHDR":  # the first chunk by specification; Pillow would take another size from behind any other chunk
                raise ValueError("the first chunk is no IHDR")
            width, height = struct.unpack_from(">II", data, 16)
            return width, height
        return _size_of_webp(data)
    except (ValueError, KeyError, struct.error) as error:  # KeyError: simplejpeg does not know the subsampling of a broken header
        raise _refusal(data, format_name) from error


def _size_of_webp(data: bytes) -> tuple[int, int]:
    """(width, height) from the first chunk: extended (24 bits less one), lossless (14 bits less one) or lossy (14 bits)."""
    chunk = data[12:16]
    if chunk == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if chunk == b"VP8L":
        bits = struct.unpack_from("<I", data, 21)[0]
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", data, 26)
    return width & 0x3FFF, height & 0x3FFF


def _has_too_many_scans(data: bytes) -> bool:
    """Whether a decoder would pass over the image more than _MOST_SCANS times."""
    if data.count(b"\xff\xda") <= _MOST_SCANS:  # the usual case: all starts of scans, and what looks like one in other segments
        return False
    position, num_scans = 2, 0
    while marker := _JPEG_SEGMENT.search(data, position):
        code, position = marker[1][0], marker.end()
        if code == _EOI:  # what cameras append behind it is not decoded
            return False
        num_scans += code == _SOS
        if num_scans > _MOST_SCANS:
            return True
        position += int.from_bytes(data[position : position + 2], "big")
    return False


def _decode_plain_jpeg(data: bytes) -> npt.NDArray[np.uint8] | None:
    """The fast path, libjpeg-turbo straight into an array; None when the file asks for more than it can do."""
    if b"Exif\x00\x00" in data or b"tiff:Orientation" in data:  # perhaps turned: Pillow reads the orientation
        return None
    try:
        _, _, colour_space, _ = simplejpeg.decode_jpeg_header(data)
        if colour_space not in ("YCbCr", "Gray", "RGB"):
            return None
        pixels_HWC: npt.NDArray[np.uint8] = simplejpeg.decode_jpeg(data, colorspace="RGB")
        return pixels_HWC
    except ValueError as error:
        if "premature end" in str(error).lower():
            raise ImageError("truncated") from error
        return None  # a warning such as stray bytes between markers: Pillow, which knows more of them, has the last word


def _decode_with_pillow(data: bytes, format_name: str, size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Every mode of the three formats. The plugin is called itself: `Image.open` has a pixel limit of its own, global to the process.

    `size` is the (width, height) that was checked: a second header with another one must not get past the limit.
    """
    try:
        with _PLUGINS[format_name](io.BytesIO(data)) as image:
            if image.size != size:
                raise ImageError(f"damaged {format_name}")
            image.load()
            return np.array(_upright_rgb(image))
    except _DECODER_ERRORS as error:
        raise _refusal(data, format_name) from error


def _upright_rgb(image: PngImageFile | WebPImageFile | JpegImageFile) -> Image.Image:
    turned = ImageOps.exif_transpose(image)
    if turned.mode.startswith("I"):  # 16-bit grey, "I;16" or, in older Pillow, "I"
        return Image.fromarray((np.asarray(turned).clip(0, 0xFFFF) >> 8).astype(np.uint8)).convert("RGB")
    if turned.mode == "CMYK" and "adobe" not in image.info:
        turned = ImageChops.invert(turned)  # Pillow takes every CMYK JPEG for Adobe's inverted one
    if turned.has_transparency_data:
        rgba = turned.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return turned.convert("RGB")


def _refusal(data: bytes, format_name: str) -> ImageError:
    """`truncated` when the end of the file is not there, else `damaged FORMAT`."""
    if format_name == "JPEG":
        complete = b"\xff\xd9" in data[-1024:]  # cameras append bytes behind the end marker
    elif format_name == "PNG":
        complete = b"IEND" in data[-1024:]
    else:
        complete = len(data) >= 12 and len(data) >= struct.unpack_from("<I", data, 4)[0] + 8
    return ImageError(f"damaged {format_name}" if complete else "truncated")
