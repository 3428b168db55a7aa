"""From a job, or from what a user typed, to the stores that are meant.

Unit of data: one `SoftLabelStore`.
"""

from __future__ import annotations

from pathlib import Path

from distill.errors import StoreError
from student_trainer.job import TrainJob
from student_trainer.settings import StoreSettings
from student_trainer.store import IDENTITY, SoftLabelStore, read_identity
from student_trainer.store_cache import SegmentCache
from student_trainer.store_files import open_files


def open_label_store(job: TrainJob) -> SoftLabelStore:
    """The store that a job reads through.

    Raises:
        FingerprintMismatch, StoreError: see `SoftLabelStore`.
    """
    assert job.store_folder is not None
    assert job.store_identity is not None
    return SoftLabelStore(job.store_folder, job.store_identity, cache_of(job.store))


def cache_of(settings: StoreSettings) -> SegmentCache:
    """Where segments of an object store are kept on this machine."""
    folder = Path(settings.cache).expanduser() if settings.cache else Path.home() / ".cache" / "distill" / "labels"
    return SegmentCache(folder, int(settings.cache_gb * 1e9))


def folder_of_stores(path: str, name: str) -> str:
    """Where the store `name` lies in `store.path`, which is a folder or a URL; absolute."""
    return f"{path.rstrip('/')}/{name}" if "://" in path else str((Path(path) / name).absolute())


def is_there(where: str) -> bool:
    """Whether there is a store at a path or URL.

    Raises:
        StoreError: it cannot be told.
    """
    try:
        return bool(open_files(where).sizes([IDENTITY]))
    except OSError as error:
        raise StoreError(f"{where} cannot be read: {error.strerror or error}") from error


def find_stores(where: str) -> list[str]:
    """The store at a path or URL, or all those in it: `store.path` holds one for each teacher, crop recipe and image set.

    Raises:
        StoreError: there is none.
    """
    files = open_files(where)
    try:
        if files.sizes([IDENTITY]):
            return [where]
        found = sorted(name.rpartition("/")[0] for name in files.names("") if name.count("/") == 1 and name.endswith(f"/{IDENTITY}"))
    except OSError as error:
        raise StoreError(f"{where} cannot be read: {error.strerror or error}") from error
    if not found:
        raise StoreError(f"no label store in {where}: neither {IDENTITY} nor a folder that holds one; `distill label` and `train` make it")
    return [f"{where.rstrip('/')}/{name}" for name in found]


def open_any_store(where: str, settings: StoreSettings | None = None) -> SoftLabelStore:
    """The store at a path or URL, whosever labels it holds.

    Raises:
        StoreError: there is none, or it cannot be read.
    """
    return SoftLabelStore(where, read_identity(where), cache_of(settings or StoreSettings()))
