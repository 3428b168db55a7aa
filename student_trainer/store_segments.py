"""A segment of the store: labels of rows of one image shard in one view, as one Parquet file that is never changed.

    row int32 | image_id | encoding uint8 | record bytes | max_tv float32 | max_logit_error float32

Rows ascend. Ids share long beginnings and are kept as differences (DELTA_BYTE_ARRAY), rows too; records are as small as they get and are
not compressed. An id that is no UTF-8 (a file name in another encoding) is kept escaped.

Unit of data: one segment as a `pyarrow.Table`. Shapes: N labels, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from distill.config import Section
from distill.soft_labels import FloatArray, Record, certified_tv, decode

SCHEMA = pa.schema(
    [
        ("row", pa.int32()),
        ("image_id", pa.string()),
        ("encoding", pa.uint8()),
        ("record", pa.binary()),
        ("max_tv", pa.float32()),
        ("max_logit_error", pa.float32()),
    ]
)
ROUNDING = 1 + 1e-6
"""float32 columns: a limit allows for the rounding of the number itself."""

ESCAPED = "\x00escaped:"
"""What an escaped image id begins with; no file name can hold a NUL."""

# A manifest may come from elsewhere, and what it names is read, moved and removed: nothing outside the store can be named.
FileName: TypeAlias = Annotated[str, Field(pattern=r"^view-[0-9]{5,}/shard-[0-9]{6,}\.[0-9a-f]+\.parquet$")]


class Segment(Section):
    """One entry of the manifest."""

    view: int = Field(ge=0)
    """View of the crops."""
    shard: int = Field(ge=0)
    """Image shard."""
    file: FileName
    """Path inside the store."""
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    """Of the file."""
    num_labels: int
    """Labels in it."""
    size_bytes: int
    """Size of the file."""
    temperatures: tuple[float, ...]
    """Temperatures at which `max_tv` was computed."""
    replaces: tuple[FileName, ...] = ()
    """Files whose labels it holds in their place; they count no more, and may be gone."""
    worst_tv: float | None = None
    """Largest `max_tv` of its labels, so that who wants to know if they are exact enough need not read them. None: not stated."""


@dataclass(frozen=True)
class ShardLabels:
    """The labels of one image shard in one view that can be read at the wanted temperature."""

    rows: dict[int, int]
    """row of the image shard -> position below."""
    image_ids: list[str]
    logits_NK: FloatArray
    tv_N: FloatArray
    """Bound of each label's total-variation error at the temperature it was read at: exact where that was foreseen, else certified."""


def make_table(rows: Sequence[int], image_ids: Sequence[str], records: Sequence[Record]) -> pa.Table:
    """Labels as a table, rows ascending."""
    table = pa.table(
        {
            "row": np.asarray(rows, dtype=np.int32),
            "image_id": [_escaped(image_id) for image_id in image_ids],
            "encoding": [int(record.encoding) for record in records],
            "record": [record.data for record in records],
            "max_tv": [record.max_tv for record in records],
            "max_logit_error": [record.max_logit_error for record in records],
        },
        schema=SCHEMA,
    )
    return table.take(np.argsort(np.asarray(rows), kind="stable"))


def image_ids_of(table: pa.Table) -> list[str]:
    """The image ids of a segment's table, as the source says them."""
    image_ids: list[str] = table["image_id"].to_pylist()
    if not pc.any(pc.starts_with(table["image_id"], ESCAPED)).as_py():
        return image_ids
    return [
        image_id.removeprefix(ESCAPED).encode("ascii").decode("unicode_escape") if image_id.startswith(ESCAPED) else image_id
        for image_id in image_ids
    ]


def _escaped(image_id: str) -> str:
    try:
        image_id.encode()
    except UnicodeEncodeError:  # lone surrogates: bytes of a file name that are no UTF-8
        return ESCAPED + image_id.encode("unicode_escape").decode("ascii")
    return ESCAPED + image_id.encode("unicode_escape").decode("ascii") if image_id.startswith(ESCAPED) else image_id


def table_bytes(table: pa.Table) -> bytes:
    """The Parquet file."""
    sink = pa.BufferOutputStream()
    encodings = {"row": "DELTA_BINARY_PACKED", "image_id": "DELTA_BYTE_ARRAY"}
    pq.write_table(table, sink, compression="none", use_dictionary=["encoding"], column_encoding=encodings)
    return sink.getvalue().to_pybytes()


def read_bytes(data: bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """The table of a Parquet file.

    Raises:
        pa.ArrowException: it is none, or is damaged.
    """
    return pq.ParquetFile(pa.BufferReader(data)).read(columns=list(columns) if columns else None, use_threads=False)


def errors_at(segment: Segment, table: pa.Table, temperature: float) -> npt.NDArray[Any]:
    """[N]: bound of each label's total-variation error at a temperature, exact where it was foreseen."""
    if temperature in segment.temperatures:
        return table["max_tv"].to_numpy()
    return certified_tv(table["max_logit_error"].to_numpy().astype(np.float64), temperature)


def readable_rows(segment: Segment, table: pa.Table, temperature: float, max_tv: float) -> npt.NDArray[Any]:
    """int32 [M]: the rows whose label is known to be within `max_tv` at a temperature."""
    rows: npt.NDArray[Any] = table["row"].to_numpy()
    return rows[errors_at(segment, table, temperature).astype(np.float32) <= max_tv * ROUNDING]


def read_labels(tables: Sequence[tuple[Segment, pa.Table]], temperature: float, max_tv: float, num_classes: int) -> ShardLabels:
    """Of every row its most exact label at `temperature`, where that is within `max_tv`. Of equally exact ones the first committed.

    Raises:
        StoreError: a record that cannot be decoded.
    """
    if not tables:
        return ShardLabels({}, [], np.empty((0, num_classes), np.float32), np.empty(0, np.float32))
    tv_N = np.concatenate([errors_at(segment, table, temperature) for segment, table in tables]).astype(np.float32)
    table = tables[0][1] if len(tables) == 1 else pa.concat_tables([table for _, table in tables])
    order = np.lexsort((tv_N, table["row"].to_numpy()))  # stable: the first committed stays first
    order = order[tv_N[order] <= max_tv * ROUNDING]
    rows = table["row"].to_numpy()[order]
    chosen = order[np.flatnonzero(np.diff(rows, prepend=-1))]
    if len(chosen) != len(table) or (np.diff(chosen) != 1).any():
        table = table.take(chosen)
    return ShardLabels(
        rows={row: position for position, row in enumerate(table["row"].to_pylist())},
        image_ids=image_ids_of(table),
        logits_NK=decode(table["encoding"].to_pylist(), table["record"].to_pylist(), num_classes),
        tv_N=tv_N[chosen],
    )
