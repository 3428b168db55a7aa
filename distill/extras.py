"""Optional dependencies: the one sentence by which they come in. The project is on no package index, so a checkout is what pip is given."""

from __future__ import annotations


def how_to_install(extra: str) -> str:
    """What brings the packages of an extra of pyproject.toml; without constraints.txt, which `litert` and `executorch` do not go with."""
    return f"pip install -e '.[{extra}]' in the checkout of distill"
