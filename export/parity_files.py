"""Where the parity gate's findings lie, and whether they are about a given teacher. Needs neither torch nor onnx.

Unit of data: one report beside one graph. A graph that failed leaves its report under another name, so that the report of an older graph,
which stays in the folder, stays with it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

REPORT_FILE = "parity.json"
"""Of the graph beside it, which passed."""
FAILED_REPORT_FILE = "parity-failed.json"
"""Of the last graph that failed, and was not kept."""
WORST_FOLDER = "worst"
"""Pictures of the crops that the last graph was worst on, whether it passed or not."""


def report_of(model: Path, fingerprint: str) -> bytes | None:
    """The report beside a teacher graph, if it is about this very teacher and says that it passed; None otherwise."""
    path = model.with_name(REPORT_FILE)
    try:
        content = path.read_bytes()
        report: Any = json.loads(content)
    except (OSError, ValueError):
        return None
    passed = isinstance(report, dict) and report.get("fingerprint") == fingerprint and report.get("failures") == []
    return content if passed else None
