"""The fields of the run file as text: for the help of a verb and for docs/run_file.md."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from distill.cli.run_file import RunFile
from distill.config import Section, section_in


def section_fields(section: str) -> list[tuple[str, str, str]]:
    """(path, default, help) of every field of one section of the run file."""
    for name, field in RunFile.model_fields.items():
        if (field.alias or name) == section:
            return list(_walk(field, section))
    raise KeyError(section)


def _walk(field: FieldInfo, path: str) -> Iterator[tuple[str, str, str]]:
    kind = section_in(field.annotation)
    if kind is None:
        yield path, _default(field), field.description or ""
        return
    if "list" in str(field.annotation):
        path += ".N"
    for name, inner in kind.model_fields.items():
        yield from _walk(_with_default(inner, field, name), f"{path}.{inner.alias or name}")


def _with_default(inner: FieldInfo, outer: FieldInfo, name: str) -> FieldInfo:
    """The inner field with the default that the outer section gives it."""
    given = outer.get_default(call_default_factory=True)
    if not isinstance(given, Section):
        return inner
    copy = FieldInfo(annotation=inner.annotation, default=getattr(given, name), description=inner.description, alias=inner.alias)
    return copy


def _default(field: FieldInfo) -> str:
    value: Any = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "(required)"
    return json.dumps(value, default=list)
