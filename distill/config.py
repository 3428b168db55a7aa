"""The one way settings come in: a YAML run file, validated into typed classes, overridden by `section.key=value` words.

Each package keeps the classes of its own settings in its `settings.py` (apart from the code they steer, so that reading a run file
never imports torch). The docstring under a field is its help text, on the command line and in `docs/run_file.md`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from pathlib import Path
from typing import Any, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from distill.errors import ConfigError

S = TypeVar("S", bound="Section")


class Section(BaseModel):
    """Base of every group of settings: frozen, no unknown keys, docstrings under the fields are their help."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _keep_nested_defaults(cls, tree: Any) -> Any:
        """A nested section that is given in part keeps, for the rest, the defaults that this section documents for it."""
        if not isinstance(tree, dict):
            return tree
        defaults = {field.alias or name: field.default for name, field in cls.model_fields.items()}
        return {key: _over(defaults.get(key), value) for key, value in tree.items()}

    def digest(self, **more: Any) -> str:
        """sha256 (hex) of these settings and of `more`; equal settings give equal digests in every process."""
        return digest_of({"settings": self.model_dump(mode="json"), **more})

    def replace(self, **changes: Any) -> Self:
        """A validated copy with some fields changed. What was left to its default still counts as left (`model_fields_set`)."""
        return type(self).model_validate({**{name: getattr(self, name) for name in self.model_fields_set}, **changes}, by_name=True)


def _over(default: Any, given: Any) -> Any:
    """`given` laid over the section `default`, field by field; as it is where either is something else."""
    if not isinstance(default, Section) or not isinstance(given, dict):
        return given
    fields = type(default).model_fields.items()
    kept = {field.alias or name: getattr(default, name) for name, field in fields}
    # What `default` itself leaves open stays open, so that `model_fields_set` tells what was given.
    chosen = {field.alias or name: getattr(default, name) for name, field in fields if name in default.model_fields_set}
    return {**chosen, **{key: _over(kept.get(key), value) for key, value in given.items()}}


def digest_of(value: Any) -> str:
    """sha256 (hex) of a JSON-able value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def load_run_file(kind: type[S], path: Path, overrides: list[str]) -> S:
    """Read a run file and the overrides into `kind`.

    Raises:
        ConfigError: the file is not there or not YAML, a key is unknown (the nearest known one is named), a value is out of range.
    """
    return validate(kind, with_overrides(read_yaml(path), overrides), origin=str(path))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: no such file, not readable as YAML, or something else than a mapping.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"run file {path} does not exist; give one with --config") from error
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"run file {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"run file {path} holds no mapping of sections; see docs/run_file.md")
    return tree


def with_overrides(tree: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """The tree with `a.b=value` words applied; values are YAML, numbers in a path index lists.

    Raises:
        ConfigError: a word without `=`, or a path through something that is no mapping or list.
    """
    for word in overrides:
        path, equals, text = word.partition("=")
        if not equals or not path:
            raise ConfigError(f"override {word!r} is not of the form section.key=value")
        try:
            value = yaml.safe_load(text) if text else None
        except yaml.YAMLError as error:
            raise ConfigError(f"override {word!r}: the value is not YAML") from error
        _set(tree, path.split("."), value, word)
    return tree


def _set(tree: Any, keys: list[str], value: Any, word: str) -> None:
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(tree, list):
            if not key.isdecimal() or int(key) >= len(tree):
                raise ConfigError(f"override {word!r}: {key!r} is not one of the positions 0 to {len(tree) - 1}")
            slot: Any = int(key)
        elif isinstance(tree, dict):
            slot = key
            if not last and tree.get(slot) is None:  # not there, or `section:` with nothing behind it
                tree[slot] = {}
        else:
            raise ConfigError(f"override {word!r}: {'.'.join(keys[:depth])} has no keys")
        if last:
            tree[slot] = value
        else:
            tree = tree[slot]


def validate(kind: type[S], tree: Any, origin: str) -> S:
    """`kind` made of plain data, with pydantic's errors turned into one line.

    Raises:
        ConfigError: the first things wrong, each with its path, its value and, for an unknown key, the nearest known one.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        complaints = [_complaint(kind, detail) for detail in error.errors()[:4]]
        raise ConfigError(f"{origin}: " + "; ".join(complaints)) from error


def _complaint(kind: type[Section], detail: ErrorDetails) -> str:
    where = ".".join(str(part) for part in detail["loc"])
    if detail["type"] != "extra_forbidden":
        given = detail["input"]
        value = f" (given: {given!r})" if isinstance(given, (str, int, float, bool, type(None))) else ""
        message = detail["msg"].removeprefix("Value error, ")  # pydantic's word for what our own validators say
        return f"{where}: {message}{value}" if where else f"{message}{value}"
    known = _known_keys(kind, detail["loc"][:-1])
    near = difflib.get_close_matches(str(detail["loc"][-1]), known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else f"known are: {', '.join(sorted(known))}"
    return f"{where}: unknown key; {hint}"


def _known_keys(kind: type[Section], path: tuple[int | str, ...]) -> list[str]:
    """The keys, as the user writes them, of the section that a path of keys leads to."""
    for part in path:
        if isinstance(part, int):
            continue
        field = _fields_by_key(kind).get(part)
        nested = section_in(field.annotation) if field else None
        if nested is None:
            return []
        kind = nested
    return list(_fields_by_key(kind))


def _fields_by_key(kind: type[Section]) -> dict[str, FieldInfo]:
    return {field.alias or name: field for name, field in kind.model_fields.items()}


def section_in(annotation: Any) -> type[Section] | None:
    """The section class inside an annotation such as `list[StudentSettings]` or `X | None`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = section_in(argument)
        if found:
            return found
    return None
