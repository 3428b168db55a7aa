"""Parquet tables with one encoded image a row: a binary column, or the {bytes, path} struct that Hugging Face datasets write.

Unit of data: one row group, which is a shard: read whole, so row groups should hold hundreds of images, not millions.

Specifications: Apache Parquet; the `huggingface` key of the schema metadata (class names of a ClassLabel feature).
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distill.errors import SourceError
from distill.sources.files import opened, read_lines, short_names
from distill.sources.records import IdsDigest, ImageRecord, ShardInfo, checked_label, digest_of_shards, label_named

_USUAL_IMAGE_COLUMN = "image"
_USUAL_LABEL_COLUMNS = ("label", "cls")


@dataclass(frozen=True)
class Columns:
    """Which columns to read; None: find it, or do without."""

    image: str | None = None
    label: str | None = None
    image_id: str | None = None


@dataclass(frozen=True)
class _RowGroup:
    """Where one shard lies."""

    url: str
    file_name: str
    index: int
    first_row: int


@dataclass(frozen=True)
class ParquetSource:
    """Images in the row groups of Parquet files, local or in an object store."""

    image_column: str
    label_column: str | None
    id_column: str | None
    class_names: tuple[str, ...] | None
    shards: tuple[ShardInfo, ...]
    ids_digests: tuple[str, ...]
    row_groups: tuple[_RowGroup, ...]

    @property
    def num_images(self) -> int:
        """Records in all shards."""
        return sum(shard.num_records for shard in self.shards)

    def read_shard(self, index: int) -> list[ImageRecord]:
        """The records of one row group, in row order. A row without an image has empty data, which decoding refuses and lists.

        Raises:
            SourceError: the file is gone, damaged or changed; a label that is not one; paths where image bytes should be.
        """
        columns = self._read(index, self.image_column, self.id_column, self.label_column)
        images, labels = columns[self.image_column], self._labels_in(index, columns)
        where = f"{self.row_groups[index].url}: column {self.image_column!r}"
        return [ImageRecord(image_id, _image_bytes(image, where), label) for (image_id, label), image in zip(labels, images, strict=True)]

    def read_labels(self, index: int) -> list[tuple[str, int | None]]:
        """(image_id, label) of one row group, from the columns of ids and labels alone."""
        return self._labels_in(index, self._read(index, self.id_column, self.label_column))

    def _labels_in(self, index: int, columns: dict[str, list[Any]]) -> list[tuple[str, int | None]]:
        group, num_rows = self.row_groups[index], self.shards[index].num_records
        ids = _ids_of(group, columns[self.id_column] if self.id_column else None, num_rows)
        values = columns[self.label_column] if self.label_column else [None] * num_rows
        where = f"{group.url}: column {self.label_column!r}"
        return [(image_id, _label_of(value, self.class_names, where)) for image_id, value in zip(ids, values, strict=True)]

    def digest(self) -> str:
        """sha256 (hex) over the row groups, with the ids of an id column and the size of each group."""
        return digest_of_shards(self.shards, self.ids_digests)

    def _read(self, index: int, *columns: str | None) -> dict[str, list[Any]]:
        """The values of those columns that there are."""
        group, shard = self.row_groups[index], self.shards[index]
        with _parquet_file(group.url) as table:
            if group.index >= table.num_row_groups or table.metadata.row_group(group.index).num_rows != shard.num_records:
                raise SourceError(f"{group.url} is another file than when it was opened; start again with the new file")
            return table.read_row_group(group.index, columns=[name for name in columns if name]).to_pydict()


def open_parquet(urls: list[str], columns: Columns, class_names: tuple[str, ...] | None) -> ParquetSource:
    """A source of all row groups of the files, in order.

    Raises:
        SourceError: not Parquet, damaged, without the columns asked for, with an id twice, or without a row.
    """
    columns, class_names = _resolve(urls, columns, class_names)
    groups: list[_RowGroup] = []
    shards: list[ShardInfo] = []
    digests: list[str] = []
    seen: set[str] = set()
    for url, name in zip(urls, short_names(urls), strict=True):
        first_row = 0
        with _parquet_file(url) as table:
            for index in range(table.num_row_groups):
                group, facts = _RowGroup(url, name, index, first_row), table.metadata.row_group(index)
                digest = IdsDigest()
                digest.add(name, facts.total_byte_size)
                if columns.image_id:
                    values = table.read_row_group(index, columns=[columns.image_id]).column(0).to_pylist()
                    for image_id in _ids_of(group, values, facts.num_rows):
                        if image_id in seen:
                            raise SourceError(f"{url}: id {image_id!r} is there twice in column {columns.image_id!r}; ids must be unique")
                        seen.add(image_id)
                        digest.add(image_id, 0)
                groups.append(group)
                shards.append(ShardInfo(f"{name}/{index:06d}", facts.num_rows))
                digests.append(digest.hex())
                first_row += facts.num_rows
    if not any(shard.num_records for shard in shards):
        raise SourceError(f"{urls[0]} holds no rows; give a table with images")
    assert columns.image is not None
    return ParquetSource(columns.image, columns.label, columns.image_id, class_names, tuple(shards), tuple(digests), tuple(groups))


def _resolve(urls: list[str], columns: Columns, class_names: tuple[str, ...] | None) -> tuple[Columns, tuple[str, ...] | None]:
    """The columns that all files have and the class names, found where they were not given."""
    with _parquet_file(urls[0]) as table:
        schema = table.schema_arrow
    found = replace(columns, image=_image_column(urls[0], schema, columns.image))
    if found.label is None:
        found = replace(found, label=next((name for name in _USUAL_LABEL_COLUMNS if name in schema.names), None))
    for url in urls:
        with _parquet_file(url) as table:
            for name in (found.image, found.label, found.image_id):
                if name is not None and name not in table.schema_arrow.names:
                    raise SourceError(f"{url} has no column {name!r}; it has {_listed(table.schema_arrow)}")
    if class_names is None:
        lines = read_lines(f"{posixpath.dirname(urls[0])}/class_names.txt")
        class_names = tuple(lines) if lines else None
    if found.label is None:
        return found, class_names
    kind = schema.field(found.label).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return found, class_names if class_names is not None else _names_in(urls, found.label)
    if not pa.types.is_integer(kind):
        raise SourceError(f"{urls[0]}: label column {found.label!r} holds {kind}; it must hold whole numbers or names")
    return found, class_names if class_names is not None else _hugging_face_names(schema, found.label)


def _image_column(url: str, schema: pa.Schema, asked: str | None) -> str:
    if asked is not None:
        if asked not in schema.names:
            raise SourceError(f"{url} has no column {asked!r}; it has {_listed(schema)}")
        if not _can_hold_images(schema.field(asked).type):
            raise SourceError(f"{url}: column {asked!r} holds {schema.field(asked).type}; images must be binary or {{bytes, path}}")
        return asked
    fitting = [field.name for field in schema if _can_hold_images(field.type)]
    if len(fitting) == 1:
        return str(fitting[0])
    if _USUAL_IMAGE_COLUMN in fitting:
        return _USUAL_IMAGE_COLUMN
    several = "several columns that can hold images" if fitting else "no column that can hold images"
    raise SourceError(f"{url} has {several}; name one with image_column: it has {_listed(schema)}")


def _can_hold_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        position = kind.get_field_index("bytes")
        return position >= 0 and _can_hold_images(kind.field(position).type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _listed(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} ({'struct' if pa.types.is_struct(field.type) else field.type})" for field in schema)


def _names_in(urls: list[str], column: str) -> tuple[str, ...]:
    """The sorted names in a label column of all files."""
    names: set[str] = set()
    for url in urls:
        with _parquet_file(url) as table:
            for index in range(table.num_row_groups):
                names.update(table.read_row_group(index, columns=[column]).column(0).unique().to_pylist())
    return tuple(sorted(name for name in names if name is not None))


def _hugging_face_names(schema: pa.Schema, column: str) -> tuple[str, ...] | None:
    """The names that a ClassLabel feature keeps in the schema's metadata."""
    text = (schema.metadata or {}).get(b"huggingface")
    if text is None:
        return None
    try:
        names = json.loads(text)["info"]["features"][column].get("names")
    except (ValueError, KeyError, TypeError, AttributeError):
        return None  # written by hand, or before the column was added: the labels are numbers without names
    return tuple(names) if names else None


def _ids_of(group: _RowGroup, values: list[Any] | None, num_rows: int) -> list[str]:
    if values is None:
        return [f"{group.file_name}/{row:08d}" for row in range(group.first_row, group.first_row + num_rows)]
    return [str(value) for value in values]


def _label_of(value: Any, class_names: tuple[str, ...] | None, where: str) -> int | None:
    if value is None or value == -1:  # -1 is how Hugging Face writes that there is no label
        return None
    if isinstance(value, str):
        return label_named(value, class_names, where)
    return checked_label(value, class_names, where)


def _image_bytes(value: Any, where: str) -> bytes:
    if isinstance(value, dict):
        if value.get("bytes") is None and value.get("path"):
            raise SourceError(f"{where} keeps paths, not images; write the table again with the image bytes embedded")
        value = value.get("bytes")
    return bytes(value) if value is not None else b""


@contextmanager
def _parquet_file(url: str) -> Iterator[pq.ParquetFile]:
    """An opened Parquet file, pyarrow's errors turned into one line."""
    with opened(url) as file:
        try:
            with pq.ParquetFile(file) as table:
                yield table
        except (pa.ArrowException, OSError) as error:
            raise SourceError(f"{url} cannot be read as Parquet: {' '.join(str(error).split())}") from error
