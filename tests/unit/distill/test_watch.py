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
    def __init__(self, fails: Exception | None = None, fails_to_close: Exception | None = None) -> None:
        self.rows: list[dict[str, Any]] = []
        self.closed: list[bool] = []
        self.fails, self.fails_to_close = fails, fails_to_close

    def show(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if self.fails:
            raise self.fails

    def close(self, failed: bool) -> None:
        self.closed.append(failed)
        if self.fails_to_close:
            raise self.fails_to_close


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
    bad, good = Listener(OSError("no space left on device")), Listener()
    with Watch(board, tmp_path / "metrics.jsonl", [bad, good]):
        board.post(kind="step", step=1)
        board.post(kind="step", step=2)
    assert len(bad.rows) == 1
    assert [row["step"] for row in good.rows] == [1, 2]
    assert len(journal_of(tmp_path / "metrics.jsonl")) == 2
    assert "Listener shows no more: no space left on device" in capsys.readouterr().out
    assert (bad.closed, good.closed) == ([True], [False])


def test_a_line_that_was_cut_off_stays_by_itself(board: FakeBoard, tmp_path: Path) -> None:
    journal = tmp_path / "metrics.jsonl"
    journal.write_text('{"kind": "step", "step": 1}\n{"kind": "st')
    for step in (2, 3):  # two processes
        with Watch(board, journal, []):
            board.post(kind="step", step=step, time=1.0)
    first, torn, *later = journal.read_text().splitlines()
    assert (first, torn) == ('{"kind": "step", "step": 1}', '{"kind": "st')
    assert [json.loads(line)["step"] for line in later] == [2, 3]


@pytest.mark.parametrize("path", ["/dev/full", "no/such/folder/metrics.jsonl"])
def test_without_a_journal_the_others_go_on_and_it_is_said_once(board: FakeBoard, path: str, capsys: pytest.CaptureFixture[str]) -> None:
    listener = Listener()
    with Watch(board, Path(path), [listener]):
        for step in (1, 2):
            board.post(kind="step", step=step)
    assert [row["step"] for row in listener.rows] == [1, 2]
    assert listener.closed == [False]
    assert capsys.readouterr().out.count("Journal shows no more: ") == 1


def test_a_fault_in_a_sink_is_raised_at_the_end_and_stops_no_other(board: FakeBoard, tmp_path: Path) -> None:
    bad, good = Listener(KeyError("totals")), Listener()
    for step in (1, 2):
        board.post(kind="step", step=step)
    with pytest.raises(KeyError, match="totals"), Watch(board, tmp_path / "metrics.jsonl", [bad, good]):
        pass
    assert [row["step"] for row in good.rows] == [1, 2]
    assert good.closed == [False]
    assert len(journal_of(tmp_path / "metrics.jsonl")) == 2


def test_all_are_closed_though_one_cannot(board: FakeBoard, tmp_path: Path) -> None:
    bad, good = Listener(fails_to_close=ValueError("closed before")), Listener()
    with pytest.raises(ValueError, match="closed before"), Watch(board, tmp_path / "metrics.jsonl", [bad, good]):
        pass
    assert good.closed == [False]


def test_a_board_that_says_nonsense_ends_the_watch_and_is_raised(board: FakeBoard, tmp_path: Path) -> None:
    listener = Listener()
    board.rows = None  # type: ignore[assignment]
    with pytest.raises(TypeError), Watch(board, tmp_path / "metrics.jsonl", [listener]):
        pass
    assert listener.closed == [False]


def test_the_error_of_the_work_comes_before_that_of_a_sink(board: FakeBoard, tmp_path: Path) -> None:
    board.post(kind="step", step=1)
    with pytest.raises(ValueError, match="broke"), Watch(board, tmp_path / "metrics.jsonl", [Listener(KeyError("totals"))]):
        raise ValueError("broke")
