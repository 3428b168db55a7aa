"""What the parity gate found, for people: one line when it passed, a table when it did not.

Unit of data: one report of the gate, plain data, so that nothing heavy is imported for it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.table import Table

from distill.errors import ParityError
from distill.progress import console
from export.parity_files import FAILED_REPORT_FILE

Report = dict[str, Any]


def parity_line(report: Report) -> str:
    """The numbers that were compared with a limit, in one line."""
    kl = ", ".join(f"T={temperature}: {value:.2g}" for temperature, value in report["max_kl"].items())
    kept = report.get("kept_in_fp32") or []
    return (
        f"{report.get('precision', 'fp32')}, opset {report.get('opset')}, {report['num_images']} images,"
        f" max |dlogit| {_said(report['max_logit_error'])}, KL {kl}, top-1 agreement {report['top1_agreement']:.2%}"
        + (f", {len(kept)} layers kept in fp32" if kept else "")
        + (", 7-bit weights: this processor saturates with 8" if report.get("weight_bits") == 7 else "")
    )


@contextmanager
def table_of_failed_parity(folder: Path) -> Iterator[None]:
    """Print the failed comparison of `folder` when the block ends with a ParityError, which goes on."""
    try:
        yield
    except ParityError:
        path = folder / FAILED_REPORT_FILE
        if path.is_file():
            for table in parity_tables(json.loads(path.read_text(encoding="utf-8"))):
                console.print(table)
        raise


def parity_tables(report: Report) -> list[Table]:
    """Each number beside its limit; then the worst images."""
    limits = report["limits"]
    numbers = Table(title=f"parity of the graph ({report['engine']}) with the network", title_justify="left")
    for heading in ("", "found", "limit"):
        numbers.add_column(heading)
    numbers.add_row("images compared", str(report["num_images"]), "")
    numbers.add_row("with NaN or infinity", str(report["num_not_finite"]), "0")
    numbers.add_row("max |dlogit|", _said(report["max_logit_error"]), f"<= {limits['max_logit_error']:g}")
    for temperature, value in report["max_kl"].items():
        numbers.add_row(f"max KL, T={temperature}", _said(value), f"<= {limits['max_kl']:g}")
    numbers.add_row("top-1 agreement", f"{report['top1_agreement']:.4f}", f">= {limits['min_top1_agreement']:g}")
    numbers.add_row("|soft label - softmax|", _said(report["max_soft_label_error"]), f"<= {limits['max_soft_label_error']:g}")
    worst = Table(title="worst images", title_justify="left")
    for heading in ("rank", "image", "|dlogit|", "KL", "network's class", "graph's class"):
        worst.add_column(heading)
    for rank, image in enumerate(report["worst"], start=1):
        classes = (str(image["reference_class"]), str(image["graph_class"]))
        worst.add_row(str(rank), image["image_id"], _said(image["logit_error"]), _said(image["kl"]), *classes)
    return [numbers, worst]


def _said(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3g}"
