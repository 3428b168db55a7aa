"""What a bundle says of itself. Needs neither torch nor onnx, so that an archive is checked at once. Unit of data: one archive."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import IO, Literal

from distill import __version__
from distill.config import Section

MANIFEST = "manifest.json"


class BundledFile(Section):
    """One file of a bundle."""

    sha256: str
    """Of its bytes."""
    size_bytes: int
    """Of it."""


class BundleManifest(Section):
    """`manifest.json`: everything that belongs to a bundle but itself."""

    format: Literal["distill.bundle/1"] = "distill.bundle/1"
    """Version of this form."""
    made_by: str = f"distill {__version__}"
    """The program."""
    student: str
    """Name of the student, and of the folder in the archive."""
    recommended: str
    """The file to take."""
    files: dict[str, BundledFile]
    """Name in the folder -> what it must be."""


def checksum_of(archive: Path) -> Path:
    """Where the checksum of an archive lies."""
    return archive.with_name(archive.name + ".sha256")


def digest_of_stream(stream: IO[bytes]) -> tuple[str, int]:
    """SHA-256 and length of what can be read."""
    digest, size_bytes = hashlib.sha256(), 0
    while chunk := stream.read(2**20):
        digest.update(chunk)
        size_bytes += len(chunk)
    return digest.hexdigest(), size_bytes
