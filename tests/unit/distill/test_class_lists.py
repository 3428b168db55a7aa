"""Class lists in every form that people have them in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distill.class_lists import read_class_names, repeated
from distill.errors import ConfigError

NAMES = ("cat", "sea lion", "Käfer")


@pytest.mark.parametrize(
    "content",
    [
        "cat\nsea lion\nKäfer",
        "\ufeffcat\r\n sea lion \r\nKäfer\r\n\r\n",
        json.dumps(NAMES),
        json.dumps({"2": "Käfer", "0": "cat", "1": "sea lion"}),
    ],
)
def test_files(tmp_path: Path, content: str) -> None:
    path = tmp_path / "classes"
    path.write_text(content, encoding="utf-8")
    assert read_class_names(str(path)) == NAMES


def test_comma_list() -> None:
    assert read_class_names("cat, sea lion,Käfer") == NAMES


def test_more_than_ten_ids_are_in_the_order_of_numbers(tmp_path: Path) -> None:
    path = tmp_path / "classes.json"
    path.write_text(json.dumps({str(number): f"class {number}" for number in sorted(range(12), key=str)}), encoding="utf-8")
    assert read_class_names(str(path)) == tuple(f"class {number}" for number in range(12))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"cat\n\ndog\n", "name 2 of 3 is empty"),
        (b"cat\n", "1 name is given"),
        (b'["cat", 7]', "7 is no name"),
        (b'{"0": "cat", "2": "dog"}', 'go from "0" to "1", and "1" is missing'),
        (b'{"0": ["n01440764", "tench"], "1": "b"}', r'\["n01440764", "tench"\] is no name'),
        (b'["cat", "dog"', "no valid JSON"),
        (b"\xff\xfe\x00\xd8", "cannot be read as text"),
    ],
)
def test_refused_files(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "classes"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=said) as caught:
        read_class_names(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "said"), [("classes.txt", "neither a file that exists nor a list"), ("cat,,dog", "name 2 of 3 is empty")])
def test_refused_words(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_class_names(text)


def test_repeated() -> None:
    assert repeated(("crane", "cat", "crane", "maillot", "maillot")) == ["crane", "maillot"]
    assert repeated(NAMES) == []
