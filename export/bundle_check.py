"""Whether a bundle is whole: every file there, none altered, cut short or added, and nothing in it that could write outside its folder.

The archive is read and never unpacked. Unit of data: one archive, or the folder that somebody unpacked it into.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from pydantic import ValidationError

from distill.errors import BadInput
from export.bundle_manifest import MANIFEST, BundleManifest, checksum_of, digest_of_stream
from export.files import first_line, sha256_of

MOST_FILES = 10_000
SPECIAL_BITS = 0o7000
"""Of a file's mode: it would run as its owner or group, or stick."""
MOST_MANIFEST_BYTES = 2**24
_BROKEN = (tarfile.TarError, ValueError, OSError, RecursionError, MemoryError)
"""ValueError: a header that Python takes for damaged after all. The last two: thousands of headers before one file, or a huge one."""
_NUM_END_BLOCKS = 2
"""Of zeros, by which POSIX ends an archive."""
_DEVICE = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³]) *(\.|$)", re.IGNORECASE)
"""Names that are devices to Windows in every folder, whatever follows a dot."""


@dataclass
class BundleCheck:
    """What was found."""

    student: str = ""
    """Empty where the manifest cannot be read."""
    num_files: int = 0
    """Files that the manifest names."""
    problems: list[str] = field(default_factory=list)
    """`missing NAME`, `altered NAME`, `truncated NAME`, `extra NAME`, `unsafe NAME` and others, in words; none for a whole bundle."""


@dataclass
class _Content:
    """What lies in an archive or folder: name -> (sha256, bytes that could be read, bytes that there should be)."""

    found: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    manifest: bytes | None = None
    problems: list[str] = field(default_factory=list)


def check_bundle(path: Path) -> BundleCheck:
    """Compare a bundle with its own manifest, and an archive with the checksum that lies beside it, if one does.

    Raises:
        BadInput: there is nothing, or no archive.
    """
    if path.is_dir():
        content, folder = _read_folder(path), None
    else:
        content, folder = _read_archive(path)
    check = BundleCheck(problems=content.problems)
    manifest = _parse(content, check)
    if manifest is None:
        return check
    check.student, check.num_files = manifest.student, len(manifest.files)
    if folder is not None and folder != manifest.student:
        check.problems.append(f"altered {MANIFEST}: it is of student {manifest.student!r} and lies in folder {folder!r}")
    check.problems += _differences(manifest, content)
    return check


def _differences(manifest: BundleManifest, content: _Content) -> list[str]:
    problems = []
    for name, wanted in sorted(manifest.files.items()):
        if not is_safe(name):  # said already
            continue
        if name not in content.found:
            problems.append(f"missing {name}")
            continue
        digest, num_read, num_declared = content.found[name]
        if num_read < max(num_declared, wanted.size_bytes):
            problems.append(f"truncated {name}: {num_read} of {wanted.size_bytes} bytes")
        elif digest != wanted.sha256:
            problems.append(f"altered {name}: SHA-256 {digest[:12]}... where the manifest has {wanted.sha256[:12]}...")
    return problems + [f"extra {name}" for name in sorted(content.found.keys() - manifest.files.keys())]


def _parse(content: _Content, check: BundleCheck) -> BundleManifest | None:
    if content.manifest is None:
        check.problems.append(f"missing {MANIFEST}")
        return None
    try:
        manifest = BundleManifest.model_validate(json.loads(content.manifest))
    except (ValueError, ValidationError, RecursionError) as error:
        check.problems.append(f"altered {MANIFEST}: it cannot be read ({' '.join(str(error).split())[:120]})")
        return None
    unsafe = [name for name in (manifest.student, *manifest.files) if not is_safe(name)]
    check.problems += [f"unsafe {name!r} in {MANIFEST}" for name in unsafe]
    if manifest.recommended not in manifest.files:
        check.problems.append(f"missing {manifest.recommended!r}, which {MANIFEST} recommends")
    check.problems += _clashes({MANIFEST, *manifest.files, *content.found})
    return manifest


def _clashes(names: Collection[str]) -> list[str]:
    """Names that cannot lie side by side on every disk: equal but for upper and lower case or the form of an accented letter, or a file
    that would have to be a folder."""
    taken = Counter(_folded(name) for name in names)
    taken.update({_folded(str(folder)) for name in names for folder in PurePosixPath(name).parents})
    return [
        f"unsafe {name!r}: some disks take it for another file or folder of the bundle"
        for name in sorted(names)
        if taken[_folded(name)] > 1
    ]


def _folded(name: str) -> str:
    """The same for all names that differ in case or canonical form alone (Unicode, D145)."""
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", name).casefold())


def is_safe(name: str) -> bool:
    """Whether unpacking it could only write into the folder that somebody chose, on every system and under this very name (Windows drops
    dots and spaces at the end of a part, `.` and `..` end so, too), and naming it cannot steer a terminal."""
    if not name.isprintable() or PurePosixPath(name).is_absolute() or {*name} & {"\\", ":"}:
        return False
    return all(part and part[-1] not in ". " and not _DEVICE.match(part) for part in name.split("/"))


def _read_archive(path: Path) -> tuple[_Content, str | None]:
    """What lies in an archive, and the one folder that all of it lies in."""
    content, folders = _Content(), set[str]()
    if not path.is_file():
        raise BadInput(f"{path} is not there; give a bundle made by `distill bundle make`, or the folder that it was unpacked into")
    beside = checksum_of(path)
    if beside.is_file():
        wanted, found = (beside.read_text(encoding="utf-8", errors="replace").split() or [""])[0], sha256_of(path)
        if found != wanted:
            content.problems.append(f"altered archive: SHA-256 {found[:12]}... where {beside.name} has {wanted[:12]}...")
    try:
        with tarfile.open(path, "r:") as archive:
            _read_members(archive, path.stat().st_size, content, folders)
            if path.stat().st_size < archive.offset + _NUM_END_BLOCKS * tarfile.BLOCKSIZE:
                content.problems.append("truncated archive: it has no end")
            if _has_rest(path, archive.offset):
                content.problems.append("extra bytes behind the end of the archive")
    except _BROKEN as error:
        if not content.found and content.manifest is None:
            raise BadInput(f"{path} is no bundle: {first_line(error)}") from error
        content.problems.append(f"truncated archive: {first_line(error)}")
    return content, next(iter(folders)) if len(folders) == 1 else None


def _read_members(archive: tarfile.TarFile, size_bytes: int, content: _Content, folders: set[str]) -> None:
    for number, member in enumerate(archive):
        if number >= MOST_FILES:
            content.problems.append(f"unsafe: more than {MOST_FILES} files")
            return
        folder, _, name = member.name.partition("/")
        if not member.isfile() or member.issparse() or member.mode & SPECIAL_BITS or not is_safe(member.name) or not name:
            what = "a link" if member.issym() or member.islnk() else "a plain file" if member.isfile() else "no plain file"
            what = f"mode {member.mode:o}" if member.mode & SPECIAL_BITS else what
            content.problems.append(f"unsafe {member.name!r} ({what}); do not unpack this archive")
            continue
        folders.add(folder)
        if len(folders) > 1:
            content.problems.append(f"extra {member.name} (outside the student's folder)")
            folders.discard(folder)
            continue
        if name in content.found or (name == MANIFEST and content.manifest is not None):
            content.problems.append(f"extra {name} (a second one)")
            continue
        stream = archive.extractfile(member)
        assert stream is not None
        if name == MANIFEST:
            content.manifest = stream.read(MOST_MANIFEST_BYTES)
            continue
        try:
            digest, num_read = digest_of_stream(stream)
        except tarfile.ReadError:  # the archive ends within this file
            content.found[name] = ("", max(0, size_bytes - member.offset_data), member.size)
            raise
        content.found[name] = (digest, num_read, member.size)


def _has_rest(path: Path, offset: int) -> bool:
    """Whether anything but zeros stands behind the last file, however far behind."""
    with path.open("rb") as file:
        file.seek(offset)
        return any(chunk.strip(b"\0") for chunk in iter(lambda: file.read(2**20), b""))


def _read_folder(path: Path) -> _Content:
    content = _Content()
    for root, folders, files in os.walk(path):
        for name in [*files, *(folder for folder in folders if (Path(root) / folder).is_symlink())]:
            file = Path(root) / name
            inside = file.relative_to(path).as_posix()
            if file.is_symlink() or not file.is_file() or not is_safe(inside):
                content.problems.append(f"unsafe {inside!r} (a link, no plain file, or no plain name)")
            elif inside == MANIFEST:
                content.manifest = file.read_bytes()[:MOST_MANIFEST_BYTES]
            else:
                size_bytes = file.stat().st_size
                content.found[inside] = (sha256_of(file), size_bytes, size_bytes)
    return content
