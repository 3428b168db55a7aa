"""What the driver does with rows: each is stamped, written and handed on, in order, to the last one; one sink's trouble is its own."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from distill.cluster import watch
from distill.cluster.watch import Watch


class FakeBoard:
    """Answers `take.remote()` as the actor's handle does; `ray.get` is replaced with the identity."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.lock = threading.Lock()
        self.take = self

    def remote(self) -> list[dict[str, Any]]:
        with self.lock:
            rows, self.rows = self.rows, []
            return rows

    def post(self, **row: Any) -> None:
        with self.lock:
            self.rows.append(row)


class Listener:
    def __init__(self, fails: bool = False) -> None:
        self.rows: list[dict[str, Any]] = []
        self.closed: list[bool] = []
        self.fails = fails

    def show(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if self.fails:
            raise OSError("no space left on device")

    def close(self, failed: bool) -> None:
        self.closed.append(failed)


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> FakeBoard:
    monkeypatch.setattr(watch.ray, "get", lambda answer: answer)
    monkeypatch.setattr(watch, "WATCH_EVERY_S", 0.01)
    return FakeBoard()


def journal_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_reach_the_journal_and_the_sinks_in_order_up_to_the_last(board: FakeBoard, tmp_path: Path) -> None:
    listener, journal = Listener(), tmp_path / "metrics.jsonl"
    journal.write_text('{"kind": "old"}\n')
    with Watch(board, journal, [listener]):
        for number in range(50):
            board.post(kind="step", step=number)
        board.post(kind="epoch", time=5.0)  # posted last, stamped by the worker
    old, *rows = journal_of(journal)
    assert old == {"kind": "old"}  # a resumed run goes on in the same file
    assert rows == listener.rows
    assert [row["step"] for row in rows[:-1]] == list(range(50))
    assert all(row["time"] > 1.7e9 for row in rows[:-1])
    assert rows[-1]["time"] == 5.0
    assert listener.closed == [False]


def test_a_failure_is_told_to_the_sinks(board: FakeBoard, tmp_path: Path) -> None:
    listener = Listener()
    with pytest.raises(ValueError, match="broke"), Watch(board, tmp_path / "metrics.jsonl", [listener]):
        raise ValueError("broke")
    assert listener.closed == [True]


def test_a_sink_that_cannot_write_is_given_up_and_the_others_go_on(
    board: FakeBoard, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, good = Listener(fails=True), Listener()
    with Watch(board, tmp_path / "metrics.jsonl", [bad, good]):
        board.post(kind="step", step=1)
        board.post(kind="step", step=2)
    assert len(bad.rows) == 1
    assert [row["step"] for row in good.rows] == [1, 2]
    assert len(journal_of(tmp_path / "metrics.jsonl")) == 2
    assert "Listener shows no more: no space left on device" in capsys.readouterr().out
