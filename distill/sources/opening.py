"""From what the user wrote to a source: decides which kind a path or URL is. Each kind is imported only when it is met.

Unit of data: one `open_source` call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from distill.errors import SourceError
from distill.sources.files import expand, is_folder, walk_files
from distill.sources.records import IMAGE_EXTENSIONS, Source

_TAR_ENDINGS = (".tar", ".tar.gz", ".tgz")
_PARQUET_ENDING = ".parquet"
_KINDS = "a folder of images (jpg, jpeg, png, webp), WebDataset shards (.tar, .tar.gz) or Parquet (.parquet)"


def open_source(
    path: str,
    *,
    class_names: Sequence[str] | None = None,
    records_per_shard: int = 1000,
    image_column: str | None = None,
    label_column: str | None = None,
    id_column: str | None = None,
) -> Source:
    """Open a set of images. Nothing is decoded; tar shards are passed over once to be counted.

    Args:
        path: a folder of images (flat, or one folder a class); WebDataset shards by name, glob `train-*.tar` or braces
            `train-{000..011}.tar.gz`; or Parquet by file, folder or glob. Local, or any URL that fsspec knows.
        class_names: the classes in the order of the labels. Give the training set's when opening its test set, so that a class that the
            test set lacks does not move the others. Default: `class_names.txt` beside shards or Parquet, the Hugging Face features in
            Parquet, else the sorted names of the class folders or of a column of names.
        records_per_shard: images in one virtual shard of a folder.
        image_column: Parquet: the column with encoded images, binary or Hugging Face's {bytes, path}. Default: the only such column, or
            `image` among several.
        label_column: Parquet: the column with class ids or class names. Default: `label` or `cls` where there is one.
        id_column: Parquet: the column with ids. Default: file name and row number.

    Raises:
        SourceError: the path does not exist, holds no images, is of no kind we know, or is damaged; the line names it and the way out.
    """
    if records_per_shard < 1:
        raise SourceError(f"records_per_shard {records_per_shard} is below 1; 1000 is a good value")
    names = tuple(class_names) if class_names is not None else None
    urls = expand(path)
    if len(urls) == 1 and is_folder(urls[0]):
        folder = urls[0].rstrip("/")
        data_files: list[str] = []
        from distill.sources.folder import open_folder

        source = open_folder(folder, _images_below(folder, data_files), names, records_per_shard)
        if source.num_images:
            return source
        urls = _data_files_in(path, folder, data_files)
    if all(url.endswith(_TAR_ENDINGS) for url in urls):
        from distill.sources.tar_shards import open_tar_shards

        return open_tar_shards(urls, names)
    if all(url.endswith(_PARQUET_ENDING) for url in urls):
        from distill.sources.parquet_tables import Columns, open_parquet

        return open_parquet(urls, Columns(image_column, label_column, id_column), names)
    raise SourceError(f"{path} is not {_KINDS}")


def _images_below(folder: str, data_files: list[str]) -> Iterator[tuple[str, int]]:
    """(path below the folder, size in bytes) of each image; what may be a table or a shard is put into `data_files` on the way."""
    for name, size_bytes in walk_files(folder):
        if name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS:
            yield name, size_bytes
        elif name.endswith((_PARQUET_ENDING, *_TAR_ENDINGS)):
            data_files.append(name)


def _data_files_in(path: str, folder: str, names: list[str]) -> list[str]:
    """The Parquet files of a folder without images. Tar shards must be named: training and test set often lie in one folder."""
    tables = [f"{folder}/{name}" for name in names if name.endswith(_PARQUET_ENDING)]
    if tables:
        return tables
    shards = [name for name in names if name.endswith(_TAR_ENDINGS)]
    if shards:
        raise SourceError(
            f"{path} is a folder of tar shards; name those to use, such as {path.rstrip('/')}/{shards[0].partition('-')[0]}-*"
        )
    raise SourceError(f"{path} holds no images; give {_KINDS}")
