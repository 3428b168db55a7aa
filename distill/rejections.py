"""The list of images that could not be used, and the limit to how many of them a job puts up with.

Unit of data: one JSON line {"image_id", "reason"} in `rejected.jsonl`. Several processes may share the file: each line is one O_APPEND
write, which the kernel does not mix with another's. The share of bad images is each process's own, of the images that it saw.

Of several workers each sees a part, and early in a pass so does one. A part may hold many bad images by chance: a job that has not seen all
stops only when the share is over the limit by more than three standard deviations of a sample without replacement.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Self

import numpy as np

from distill.errors import ConfigError, TooManyRejected
from distill.plan import Rows
from distill.sources.records import Source


class SeenImages:
    """Which images of one source were tried: a bit each, and eight bytes a shard."""

    def __init__(self, source: Source) -> None:
        sizes = np.fromiter((shard.num_records for shard in source.shards), dtype=np.int64, count=len(source.shards))
        self._begins = np.cumsum(sizes) - sizes
        self._bits = np.zeros((source.num_images + 7) // 8, dtype=np.uint8)

    def add(self, rows: Rows) -> int:
        """Note the images at `rows`, int64 [N,2] (shard, row), no image twice; returns how many are new."""
        at = self._begins[rows[:, 0]] + rows[:, 1]
        new = at[self._bits[at >> 3] >> (at & 7) & 1 == 0]
        np.bitwise_or.at(self._bits, new >> 3, (1 << (new & 7)).astype(np.uint8))
        return len(new)


class RejectionLog:
    """Counts and lists bad images. Safe to use from several threads.

    Args:
        path: `rejected.jsonl`; made, with its folder, when the first image is refused.
        max_share: largest share of the images seen that may be refused, 0 to 1.
        min_seen: below so many images `check` says nothing: the first image of a million being bad is no reason to stop.

    Raises:
        ConfigError: a share out of range.
    """

    def __init__(self, path: Path, max_share: float, min_seen: int = 100) -> None:
        if not 0 <= max_share <= 1:
            raise ConfigError(f"max_share {max_share:g} of rejected images is out of range; give 0 to 1")
        self.path = path
        self.max_share = max_share
        self.min_seen = min_seen
        self._num_seen = 0
        self._num_images = 0
        """Images of all sources that were begun."""
        self._seen: dict[str, SeenImages] = {}
        """Digest of a source -> its images."""
        self._listed: set[bytes] = set()
        """Eight bytes for each image refused: of a billion images a share may be many, and their ids would be held for the whole run."""
        self._reasons: Counter[str] = Counter()
        self._file: int | None = None
        self._lock = Lock()

    def begin(self, source: Source) -> SeenImages:
        """Which images of a source were tried; the same for all who begin the same images."""
        name = source.digest()
        with self._lock:
            if name not in self._seen:
                self._seen[name] = SeenImages(source)
                self._num_images += source.num_images
            return self._seen[name]

    def saw(self, images: SeenImages, rows: Rows) -> None:
        """The images at `rows`, int64 [N,2] (shard, row), are tried. Each counts once, however often and in whatever order they come."""
        with self._lock:
            self._num_seen += images.add(rows)

    def reject(self, image_id: str, reason: str) -> None:
        """List an image. The same image again, in a later epoch, changes nothing."""
        with self._lock:
            name = hashlib.blake2b(image_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            if name in self._listed:
                return
            self._listed.add(name)
            self._reasons[reason] += 1
            line = json.dumps({"image_id": image_id, "reason": reason}).encode() + b"\n"
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.write(self._file, line)

    @property
    def num_seen(self) -> int:
        """Images tried so far."""
        return self._num_seen

    @property
    def num_rejected(self) -> int:
        """Images refused so far."""
        return len(self._listed)

    def counts(self) -> Counter[str]:
        """Images refused so far, by reason."""
        with self._lock:
            return self._reasons.copy()

    def check(self) -> None:
        """Stop a job whose images are bad; call it once a batch.

        Raises:
            TooManyRejected: the share is over the limit by more than chance, and `min_seen` images were tried.
        """
        if self._num_seen >= self.min_seen:
            self._refuse_if_over()

    def close(self) -> None:
        """End of the job: close the file, and check a last time, however few the images. Counts stay.

        Raises:
            TooManyRejected: as `check` says.
        """
        self._close_file()
        self._refuse_if_over()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """Close, with the last check unless something else went wrong already."""
        self._close_file()
        if error is None:
            self._refuse_if_over()

    def _close_file(self) -> None:
        with self._lock:
            if self._file is not None:
                os.close(self._file)
                self._file = None

    def _refuse_if_over(self) -> None:
        reasons = self.counts()
        num_rejected, num_seen = reasons.total(), max(self._num_seen, reasons.total())
        allowed = self.max_share * num_seen
        by_chance = 3 * math.sqrt(allowed * max(0.0, 1 - num_seen / max(self._num_images, 1)))
        if num_rejected == 0 or num_rejected <= allowed + by_chance:
            return
        reason, count = reasons.most_common(1)[0]
        raise TooManyRejected(
            f"{num_rejected} of {num_seen} images ({num_rejected / num_seen:.2%}) cannot be used, over the limit of {self.max_share:.2%}; "
            f"most often: {reason} ({count}); they are listed in {self.path}: mend or remove them, or raise the limit"
        )
