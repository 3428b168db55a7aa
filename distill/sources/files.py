"""Files by path or URL, through fsspec: `photos/`, `s3://bucket/train-*.tar`, `memory://set.parquet` are all the same from here on.

Unit of data: one URL as the user wrote it, resolved to the full names of the files behind it.
"""

from __future__ import annotations

import os
import posixpath
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from operator import itemgetter
from typing import IO, Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from distill.errors import SourceError


def filesystem_of(url: str) -> tuple[Any, str]:
    """(file system, path in it) of a path or URL.

    Raises:
        SourceError: a kind of URL that is unknown, or whose library is not installed.
    """
    try:
        file_system, path = url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise SourceError(f"{url}: {_one_line(error)}") from error
    return file_system, path


def expand(url: str) -> list[str]:
    """The files or folders that a path, a brace pattern `train-{000..011}.tar` or a glob `train-*.tar` stands for, as full URLs in order.

    Raises:
        SourceError: something named does not exist, or a pattern matches nothing.
    """
    found: list[str] = []
    for part in _expand_braces(url):
        file_system, path = filesystem_of(part)
        with refused(part):
            if file_system.exists(path):  # before globbing: a folder may be called `set[1]`
                found.append(_full_name(file_system, path))
                continue
            if not any(character in path for character in "*?["):
                raise SourceError(f"{part} does not exist; check the path")
            matches = sorted(file_system.glob(path))
        if not matches:
            raise SourceError(f"no file matches {part}; check the pattern")
        found += [_full_name(file_system, match) for match in matches]
    return found


def _expand_braces(url: str) -> list[str]:
    if "{" not in url:
        return [url]
    from webdataset.shardlists import expand_urls  # here, because webdataset imports torch

    return list(expand_urls(url))


def _full_name(file_system: Any, path: str) -> str:
    return path if isinstance(file_system, LocalFileSystem) else str(file_system.unstrip_protocol(path))


def is_folder(url: str) -> bool:
    """Whether the URL is a folder (or a prefix of an object store)."""
    file_system, path = filesystem_of(url)
    with refused(url):
        return bool(file_system.isdir(path))


def walk_files(url: str) -> Iterator[tuple[str, int]]:
    """(path below the folder, size in bytes) of every file, hidden ones and those in hidden folders left out; sorted by path.

    Of a local folder, memory holds the names of one folder and of those above it, not the whole list.

    Raises:
        SourceError: the folder cannot be listed.
    """
    file_system, root = filesystem_of(url)
    root = root.rstrip("/") or "/"
    with refused(url):
        yield from _walk_local(root, "", set()) if isinstance(file_system, LocalFileSystem) else _walk_remote(file_system, root)


def _walk_remote(file_system: Any, root: str) -> Iterator[tuple[str, int]]:
    files = file_system.find(root, detail=True)
    for path, info in sorted((posixpath.relpath(path, root), info) for path, info in files.items()):
        if not any(part.startswith(".") for part in path.split("/")):
            yield path, int(info.get("size") or 0)


def _walk_local(root: str, below: str, walked: set[str]) -> Iterator[tuple[str, int]]:
    """Follows links to folders, which fsspec would leave out and subsets are often made of; each real folder once, so that a loop ends.

    Args:
        below: where in `root` to begin: empty, or a path that ends in a slash.
        walked: real paths of the folders that are done or being walked.
    """
    folder = os.path.join(root, below)
    walked.add(os.path.realpath(folder))
    with os.scandir(folder) as entries:
        shown = [entry for entry in entries if not entry.name.startswith(".")]
        # None: neither a file nor a folder, but a broken link or a socket.
        size_of = {e.name + "/" if e.is_dir() else e.name: e.stat().st_size if e.is_file() else None for e in shown}
    fresh = {name for name in size_of if name.endswith("/") and os.path.realpath(os.path.join(folder, name)) not in walked}
    # The paths of a folder begin with its name and a slash: sorted so, what is found in it lies where all paths together have it.
    for name, size_bytes in sorted(size_of.items(), key=itemgetter(0)):
        if name in fresh:
            yield from _walk_local(root, below + name, walked)
        elif size_bytes is not None:
            yield below + name, size_bytes


def short_names(urls: list[str]) -> list[str]:
    """A name for each file: its file name, or, where two folders hold the same one, its path below the folder that all share."""
    names = [posixpath.basename(url) for url in urls]
    if len(set(names)) == len(names):
        return names
    common = posixpath.commonpath([posixpath.dirname(url) for url in urls])
    return [posixpath.relpath(url, common) for url in urls]


def read_files(folder_url: str, paths: list[str]) -> list[bytes]:
    """The contents of files below a folder, fetched together where the file system can (object stores).

    Raises:
        SourceError: a file is gone or cannot be read.
    """
    file_system, root = filesystem_of(folder_url)
    contents = file_system.cat_ranges([f"{root.rstrip('/')}/{path}" for path in paths], None, None, on_error="return")
    for path, content in zip(paths, contents, strict=True):
        if isinstance(content, BaseException):
            raise SourceError(f"{folder_url}/{path} cannot be read: {_one_line(content)}") from content
    return contents


def read_lines(url: str) -> list[str] | None:
    """The non-empty lines of a small text file, or None where there is no such file."""
    file_system, path = filesystem_of(url)
    with refused(url):
        if not file_system.exists(path):
            return None
        text = file_system.cat_file(path).decode("utf-8")
    return [line.strip() for line in text.splitlines() if line.strip()]


@contextmanager
def opened(url: str) -> Iterator[IO[bytes]]:
    """The file for reading, unpacked on the way if it is called `.gz` or `.tgz`.

    Raises:
        SourceError: it cannot be read, or breaks off while it is read.
    """
    file_system, path = filesystem_of(url)
    with refused(url):
        with file_system.open(path, "rb", compression="gzip" if url.endswith("gz") else None) as file:
            yield file


@contextmanager
def refused(url: str) -> Iterator[None]:
    """Turns what file systems raise into one line with the URL.

    Raises:
        SourceError: for every `OSError` (not found, not allowed, network), and for a compressed file that is damaged or breaks off.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise SourceError(f"{url} does not exist; check the path") from error
    except EOFError as error:
        raise SourceError(f"{url} is truncated; make or copy it again") from error
    except (OSError, UnicodeDecodeError, zlib.error) as error:
        raise SourceError(f"{url} cannot be read: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or (error.args[0] if error.args else "")
    return " ".join(str(text).split()) or type(error).__name__
