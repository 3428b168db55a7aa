"""Many small segments of one image shard in one view merged into one, and labels kept twice thrown away.

Readers and writers may go on: the merged segment is written beside the old ones, its manifest entry says which of them it replaces, and
only then they are taken away. Whoever still has the old list finds a file gone, reads the manifest again and finds the merged one. Killed
at any moment, the old ones or the new one are there.

Unit of data: one (view, shard).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa

from distill.config import Section
from student_trainer.store import SoftLabelStore
from student_trainer.store_segments import SCHEMA, Segment

Merged = list[tuple[tuple[float, ...], pa.Table]]


class Compaction(Section):
    """What was done."""

    num_units: int = 0
    """(view, shard) units that were written anew."""
    num_segments_before: int
    """Segments that counted before."""
    num_segments: int
    """And after."""
    num_labels_before: int
    """Labels before, one kept twice counted twice."""
    num_labels: int
    """And after."""
    size_bytes_before: int
    """Bytes of the segments before."""
    size_bytes: int
    """And after."""
    num_leftovers: int = 0
    """Files that do not count any more and were taken away: left by writers and compactions that were killed."""


def compact(store: SoftLabelStore, on_unit: Callable[[], None] = lambda: None, remove_leftovers: bool = False) -> Compaction:
    """Merge what can be merged.

    Args:
        on_unit: called after each (view, shard).
        remove_leftovers: also take away files that the manifest does not name. Only while nobody writes: a file whose entry is just being
            written looks the same.

    Raises:
        StoreError: the store cannot be written.
    """
    before, num_units, num_leftovers = store.stats(), 0, 0
    for view, shard in store.manifest.units():
        num_units += compact_unit(store, view, shard)
        on_unit()
    if not store.files.is_local:
        store.manifest.fold()
    replaced = {segment.file for segment in store.manifest.replaced()} & store.files.names("").keys()
    for name in (*replaced, *(leftovers(store) if remove_leftovers else ())):  # whoever was killed while it merged left the replaced ones
        store.files.remove(name)
        num_leftovers += 1
    after = store.stats()
    return Compaction(
        num_units=num_units,
        num_segments_before=before.num_segments,
        num_segments=after.num_segments,
        num_labels_before=before.num_labels,
        num_labels=after.num_labels,
        size_bytes_before=before.size_bytes,
        size_bytes=after.size_bytes,
        num_leftovers=num_leftovers,
    )


def compact_unit(store: SoftLabelStore, view: int, shard: int) -> bool:
    """Merge the segments of one unit, and count out those that are gone. A file that may only be late is left alone. False: there is
    nothing to merge, another process did it, or a file that was gone is there again.

    Raises:
        StoreError: the store cannot be written.
    """
    live = store.manifest.of(view, shard)
    gone = [segment for segment in store.manifest.gone((view, shard)) if not store.manifest.is_late(segment)]
    if len(live) < 2 and not gone:
        return False
    tables = store.tables(view, shard)
    made = merge(tables)
    if not gone and len(made) == len(tables) and sum(len(t) for _, t in made) == sum(len(t) for _, t in tables):
        return False
    if not made:  # all are gone: an empty segment stands for them
        made = [(gone[0].temperatures, SCHEMA.empty_table())]
    return store.replace(view, shard, made, [segment for segment, _ in tables], gone)


def merge(tables: Sequence[tuple[Segment, pa.Table]]) -> Merged:
    """For each set of temperatures a table, rows ascending, each row once, its most exact label.

    A row stays in two tables only if each label serves a read that the other cannot: other temperatures, or more exact there. So a set of
    temperatures has a second table where one label of a row has the smaller `max_tv` and another the smaller `max_logit_error`.
    """
    groups: dict[tuple[float, ...], list[pa.Table]] = {}
    for segment, table in tables:
        groups.setdefault(segment.temperatures, []).append(table)
    best = [(temperatures, layer) for temperatures, parts in groups.items() for layer in _most_exact(pa.concat_tables(parts))]
    made: Merged = []
    for temperatures, table in best:
        needed = np.ones(len(table), dtype=bool)
        for others, other in best:
            if set(others) > set(temperatures):
                needed &= ~_served_by(table, other)
        if needed.any():
            made.append((temperatures, table.filter(pa.array(needed))))
    return made


def leftovers(store: SoftLabelStore) -> list[str]:
    """Files of segments that the manifest does not name: the remains of crashes."""
    named = {segment.file for unit in store.manifest.units() for segment in store.manifest.named_in(*unit)}
    return sorted(name for name in store.files.names("") if name.startswith("view-") and name not in named)


def _most_exact(table: pa.Table) -> list[pa.Table]:
    """The labels of each row that no other one of it equals or betters in both errors: first those of least `max_tv`, then the others."""
    rows = table["row"].to_numpy()
    order = np.lexsort((table["max_logit_error"].to_numpy(), table["max_tv"].to_numpy(), rows))
    _, rank = np.unique(table["max_logit_error"].to_numpy()[order], return_inverse=True)
    # Of a row's labels, by growing max_tv, those with a smaller logit error than all before. Each row's numbers are below the row's before.
    number = rank - np.cumsum(np.diff(rows[order], prepend=-1) != 0) * np.int64(len(rows) + 1)
    lowest_before = np.concatenate([[np.iinfo(np.int64).max], np.minimum.accumulate(number)[:-1]])[: len(rows)]
    left = order[number < lowest_before]
    layers = []
    while len(left):
        is_first = np.diff(rows[left], prepend=-1) != 0
        layers.append(table.take(left[is_first]))
        left = left[~is_first]
    return layers


def _served_by(table: pa.Table, other: pa.Table) -> np.ndarray:
    """Which rows of `table` the other one holds with no larger error of either kind. Both have ascending rows."""
    rows, others = table["row"].to_numpy(), other["row"].to_numpy()
    if not len(others):
        return np.zeros(len(rows), dtype=bool)
    at = np.minimum(np.searchsorted(others, rows), len(others) - 1)
    served = others[at] == rows
    for name in ("max_tv", "max_logit_error"):
        served &= other[name].to_numpy()[at] <= table[name].to_numpy()
    return served
