"""The fields of the run file as text: for the help of a verb and for docs/run_file.md."""

from __future__ import annotations

import json
import sys
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


MARKDOWN_HEAD = """# The run file

One YAML file holds every setting of a run; `recipes/quickstart.yaml` is one to copy. Any field can be overridden on the command line:
`distill train --config run.yaml train.epochs=3 train.students.0.optimizer.learning_rate=0.05` (a number in the path counts the items of a
list, from 0; in the tables below it is `N`). Only the fields marked (required) must be there. An unknown key is an error.

This page is made from the settings classes: `python -m distill.cli.fields > docs/run_file.md`.
"""


def run_file_markdown() -> str:
    """The text of docs/run_file.md: field, default and meaning of every setting, one table for each section of the run file."""
    sections = [(field.alias or name, field) for name, field in RunFile.model_fields.items() if section_in(field.annotation)]
    single = [row for name, field in RunFile.model_fields.items() if not section_in(field.annotation) for row in _walk(field, name)]
    parts = [MARKDOWN_HEAD, _markdown_table("The run", "What is not in a section.", single)]
    for name, field in sections:
        optional = " The section may be left out." if field.get_default() is None else ""
        parts.append(_markdown_table(f"`{name}`", f"{field.description}{optional}", section_fields(name)))
    return "\n".join(parts)


def _markdown_table(title: str, introduction: str, rows: list[tuple[str, str, str]]) -> str:
    lines = [f"## {title}", "", introduction, "", "| field | default | meaning |", "|---|---|---|"]
    for path, default, meaning in rows:
        shown = default if default == "(required)" else f"`{default}`"
        lines.append(f"| `{path}` | {shown} | {' '.join(meaning.split()).replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(run_file_markdown())
