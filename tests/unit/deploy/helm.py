"""Helm, each question in a process of its own.

Its library brings Go's runtime, which takes the signal handlers of the process that loads it: a test that sends itself SIGINT an hour later
dies of SIGSEGV.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

IS_INSTALLED = importlib.util.find_spec("helm_python") is not None


class HelmError(Exception):
    """What Helm has against a chart or its values."""


def lint(chart: Path, values: dict[str, Any]) -> dict[str, Any]:
    """What `helm lint --strict` found."""
    return _ask("lint", chart, values)


def validate(chart: Path, values: dict[str, Any]) -> None:
    """Raises HelmError: values.schema.json refuses the values."""
    _ask("validate", chart, values)


def render(chart: Path, values: dict[str, Any]) -> dict[str, str]:
    """Path of a template -> its text, of a release named `students` in the namespace `lab`. Raises HelmError."""
    return _ask("render", chart, values)


def _ask(what: str, chart: Path, values: dict[str, Any]) -> Any:
    question = json.dumps([what, str(chart), values])
    done = subprocess.run([sys.executable, __file__], input=question, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    if "refused" in answer:
        raise HelmError(answer["refused"])
    return answer["found"]


def _answer(what: str, chart: str, values: dict[str, Any]) -> Any:
    import helm_python

    if what == "lint":
        return helm_python.lint(chart, values, strict=True)
    loaded = helm_python.Chart.load(chart)
    if what == "validate":
        return loaded.validate_schema(values)
    return loaded.render(values, name="students", namespace="lab")


def _main() -> None:
    import helm_python

    try:
        answer = {"found": _answer(*json.load(sys.stdin))}
    except helm_python.HelmError as error:
        answer = {"refused": str(error)}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    _main()
