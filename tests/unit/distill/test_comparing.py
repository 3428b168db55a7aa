"""`distill compare` finds the reports of runs and refuses what is none in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill.cli.main import run_command


def test_a_folder_without_a_report_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    assert run_command(["compare", str(tmp_path / "run"), "--to", str(tmp_path / "students.html")]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / 'run' / 'report' / 'report.json'} is no report.json that can be compared" in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "students.html").exists()
