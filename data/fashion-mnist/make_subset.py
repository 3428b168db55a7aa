"""Makes the Fashion-MNIST subset that ships with the project: the four idx files in, WebDataset shards of PNGs out.

    python make_subset.py /usr/share/datasets/fashion-mnist data/fashion-mnist

The same idx files, Pillow and zlib give the same bytes: images are chosen by hash, members carry no time, owner or name of a machine.

Unit of data: one 28x28 grey image, called by its position in the original file. Format: http://yann.lecun.com/exdb/mnist/ (idx).
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import struct
import tarfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

CLASS_NAMES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
SEED = 2017
RECORDS_PER_SHARD = 1000
PARTS = {"train": ("train", 1200), "test": ("t10k", 200)}
"""Name of the part: (prefix of its idx files, images of each class)."""


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """The uint8 array in a gzipped idx file; its shape is in the header."""
    data = gzip.decompress(path.read_bytes())
    zero, kind, num_dimensions = struct.unpack_from(">HBB", data)
    if zero != 0 or kind != 0x08:
        raise SystemExit(f"{path} is not an idx file of unsigned bytes")
    shape = struct.unpack_from(f">{num_dimensions}I", data, 4)
    return np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * num_dimensions).reshape(shape)


def choose(labels: npt.NDArray[np.uint8], num_per_class: int, part: str) -> list[int]:
    """Positions of the chosen images, `num_per_class` of each class. Every ten that follow one another hold each class once, so that
    every shard is as balanced as the whole."""

    def draw(position: int) -> bytes:
        return hashlib.sha256(f"{SEED}/{part}/{position}".encode()).digest()

    columns = [sorted(np.flatnonzero(labels == label).tolist(), key=draw)[:num_per_class] for label in range(len(CLASS_NAMES))]
    short = [CLASS_NAMES[label] for label, column in enumerate(columns) if len(column) < num_per_class]
    if short:
        raise SystemExit(f"fewer than {num_per_class} images of {', '.join(short)}")
    return [position for rank in zip(*columns, strict=True) for position in sorted(rank, key=draw)]


def write_shard(path: Path, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.uint8], positions: list[int]) -> None:
    """One `.tar.gz` with KEY.png and KEY.cls for each position."""
    tar_bytes = io.BytesIO()
    with tarfile.open(fileobj=tar_bytes, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for position in positions:
            png = io.BytesIO()
            Image.fromarray(images[position]).save(png, "PNG", optimize=True)
            for suffix, data in (("png", png.getvalue()), ("cls", str(labels[position]).encode())):
                member = tarfile.TarInfo(f"{position:05d}.{suffix}")  # mtime, uid and gid are 0, the names empty
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    path.write_bytes(gzip.compress(tar_bytes.getvalue(), compresslevel=9, mtime=0))


def make_part(idx_folder: Path, out_folder: Path, part: str, num_per_class: int) -> list[Path]:
    """The shards of one part.

    Returns:
        The files written, in order.
    """
    prefix = PARTS[part][0]
    images = read_idx(idx_folder / f"{prefix}-images-idx3-ubyte.gz")
    labels = read_idx(idx_folder / f"{prefix}-labels-idx1-ubyte.gz")
    positions = choose(labels, num_per_class, part)
    out_folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for start in range(0, len(positions), RECORDS_PER_SHARD):
        path = out_folder / f"{part}-{len(written):06d}.tar.gz"
        write_shard(path, images, labels, positions[start : start + RECORDS_PER_SHARD])
        written.append(path)
    return written


def main() -> None:
    """Write all shards and the class names, and say how large they are."""
    parser = argparse.ArgumentParser(description="Make the Fashion-MNIST subset as WebDataset shards.")
    parser.add_argument("idx_folder", type=Path, help="folder with the four idx .gz files")
    parser.add_argument("out_folder", type=Path, help="folder for the shards")
    arguments = parser.parse_args()
    total_bytes = 0
    for part, (_, num_per_class) in PARTS.items():
        written = make_part(arguments.idx_folder, arguments.out_folder, part, num_per_class)
        size_bytes = sum(path.stat().st_size for path in written)
        total_bytes += size_bytes
        print(f"{part}: {len(written)} shards, {num_per_class * len(CLASS_NAMES)} images, {size_bytes / 1e6:.2f} MB")
    (arguments.out_folder / "class_names.txt").write_text("\n".join(CLASS_NAMES) + "\n", encoding="utf-8")
    print(f"in all {total_bytes / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
