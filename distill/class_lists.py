"""What the user says the classes are called -> K names in the order of the logits.

Unit of data: one list: a text file with a name on each line, a JSON file with a list or with a mapping {"0": "name"}, or the names
themselves with commas between them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill.errors import ConfigError


def read_class_names(text: str) -> tuple[str, ...]:
    """The names that a file or a comma list gives.

    Raises:
        ConfigError: neither a file nor a list, a name that is empty, ids that are not 0 to K - 1, or fewer than 2 names.
    """
    path = Path(text)
    if path.is_file():
        names = _from_file(path)
    elif "," in text:
        names = text.split(",")
    else:
        raise ConfigError(f"classes {text!r} is neither a file that exists nor a list such as cat,dog")
    names = [name.strip() for name in names]
    if "" in names:
        raise ConfigError(f"classes {text}: name {names.index('') + 1} of {len(names)} is empty")
    if len(names) < 2:
        raise ConfigError(f"classes {text}: {len(names)} name is given; a classifier has at least 2")
    return tuple(names)


def repeated(class_names: Sequence[str]) -> list[str]:
    """Names that stand for more than one class. That is allowed: the usual English list of ImageNet has two cranes."""
    return [name for name, count in Counter(class_names).items() if count > 1]


def _from_file(path: Path) -> list[str]:
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"classes {path} cannot be read as text: {error}") from error
    if not content.lstrip().startswith(("[", "{")):
        return content.rstrip().splitlines()
    try:
        tree = json.loads(content)
    except json.JSONDecodeError as error:
        raise ConfigError(f"classes {path} is no valid JSON (line {error.lineno}: {error.msg})") from error
    names = _in_order_of_ids(tree, path) if isinstance(tree, dict) else tree
    wrong = next((name for name in names if not isinstance(name, str)), None)
    if wrong is not None:
        raise ConfigError(f"classes {path}: {json.dumps(wrong)[:60]} is no name; give strings")
    return names


def _in_order_of_ids(tree: dict[str, Any], path: Path) -> list[Any]:
    missing = next((number for number in range(len(tree)) if str(number) not in tree), None)
    if missing is not None:
        raise ConfigError(f'classes {path}: the ids of {len(tree)} classes go from "0" to "{len(tree) - 1}", and "{missing}" is missing')
    return [tree[str(number)] for number in range(len(tree))]
