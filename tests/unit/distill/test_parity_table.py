"""A failed gate shows its numbers beside their limits, and ends as it would have without the table."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill.cli.parity_table import parity_line, table_of_failed_parity
from distill.errors import ParityError
from export.parity import Offender, ParityReport
from export.settings import ParityLimits

REPORT = ParityReport(
    num_images=200,
    num_not_finite=1,
    max_logit_error=0.25,
    max_kl={"1": 0.0625, "4": 0.001},
    top1_agreement=0.985,
    max_soft_label_error=None,
    engine="ONNX Runtime 1.0, CPU",
    precision="fp16",
    opset=20,
    kept_in_fp32=("a", "b"),
    limits=ParityLimits(max_logit_error=0.1),
    failures=("x",),
    worst=(Offender(image_id="cat/7.png", logit_error=None, kl=None, reference_class=3, graph_class=0),),
)


def test_the_table_and_then_the_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "parity-failed.json").write_text(REPORT.model_dump_json())
    with pytest.raises(ParityError, match="as it was"), table_of_failed_parity(tmp_path):
        raise ParityError("as it was")
    rows = [[cell.strip() for cell in line.strip("│┃ ").split("│")] for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert ["max |dlogit|", "0.25", "<= 0.1"] in rows
    assert ["max KL, T=1", "0.0625", "<= 1e-05"] in rows
    assert ["with NaN or infinity", "1", "0"] in rows
    assert ["1", "cat/7.png", "not finite", "not finite", "3", "0"] in rows


def test_nothing_is_said_of_what_went_well_or_of_another_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "parity-failed.json").write_text(REPORT.model_dump_json())
    with table_of_failed_parity(tmp_path):
        pass
    with pytest.raises(KeyError), table_of_failed_parity(tmp_path):
        raise KeyError("other")
    with pytest.raises(ParityError), table_of_failed_parity(tmp_path / "nowhere"):
        raise ParityError("no report was written")
    assert capsys.readouterr().out == ""


def test_the_line_states_precision_opset_and_numbers() -> None:
    line = parity_line(REPORT.replace(max_soft_label_error=1e-7).model_dump(mode="json"))
    assert line == (
        "fp16, opset 20, 200 images, max |dlogit| 0.25, KL T=1: 0.062, T=4: 0.001, top-1 agreement 98.50%, 2 layers kept in fp32"
    )
    seven = parity_line(REPORT.replace(precision="int8", kept_in_fp32=(), weight_bits=7).model_dump(mode="json"))
    assert seven.endswith("agreement 98.50%, 7-bit weights: this processor saturates with 8")
