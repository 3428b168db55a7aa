"""The live picture of a run: what rows say is in it, at every width; and a log gets lines instead."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console

from distill import progress
from distill.live_view import RunState, draw_run, share_bar, shares_of
from distill.progress import RowLine


def step_row(step: int, time: float, **more: Any) -> dict[str, Any]:
    return {
        "kind": "step", "time": time, "step": step, "of": 1000, "epoch": 2, "images": 100, "images_per_s": 1234.5,
        "losses": {"big": 0.4123, "small": None}, "agreement": {"big": 0.875}, "learning_rate": {"big": 0.05, "small": 0.1},
        "waits_recent": {"student": 6.0, "decode": 1.0, "teacher": 3.0, "store": 0.0},
        "bottleneck": {"for": "teacher", "share": 0.3, "scale": "more teacher instances"},
        "totals": {"asked": 3000.0, "from_store": 1000.0}, "rejected": 2, "note": "loss big 0.412", **more,
    }  # fmt: skip


MEMBER = {"url": "10.0.0.1:8001", "standing": "in", "for_s": 9.0, "in_flight": 3, "limit": 8, "latency_ms": 41.4, "images_per_s": 900.0}
AWAY = {**MEMBER, "url": "10.0.0.2:8001", "standing": "away", "for_s": 75.0, "in_flight": 0, "latency_ms": None, "images_per_s": None}


def drawn(state: RunState, now: float, width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    console.print(draw_run(state, now))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture
def state() -> RunState:
    state = RunState("distill")
    state.take(step_row(100, 1000.0))
    state.take({"kind": "epoch", "epoch": 2, "step": 200, "top1": {"big": 0.841}})
    state.take({"kind": "checkpoint", "time": 1010.0, "step": 200})
    state.take(step_row(300, 1020.0, pool={"members": [MEMBER, AWAY]}))
    return state


def test_everything_that_rows_say_is_shown(state: RunState) -> None:
    words = re.sub(r"\s+", " ", drawn(state, now=1020.0))
    for said in (
        "distill", "30%", "step 300 of 1,000, epoch 2",
        "1,234 images/s now, 1,000 mean, 1 min 10 s left",  # 20,000 images in 20 s; 70,000 are left
        "student 60% ■ decode 10% ■ teacher 30% ■ store 0%",
        "waits for teacher: more teacher instances",
        "25% from the store (1,000), the teacher asked for 3,000",
        "2 images, see rejected.jsonl",
        "step 200, 10 s ago",
        "big 0.412 87.5% 84.1% 0.05",
        "small 0.1",
        "10.0.0.1:8001 3 of 8 41 ms 900",
        "10.0.0.2:8001 0 of 8 away for 1 min 15 s",
    ):  # fmt: skip
        assert said in words, said


def test_a_student_that_stopped_and_a_silent_teacher_are_told(state: RunState) -> None:
    state.take({"kind": "stopped", "student": "small", "step": 250, "why": "diverged", "detail": "its loss is not finite"})
    state.take({"kind": "silence", "seconds": 12.0})
    words = drawn(state, now=1020.0)
    assert "small at step 250: diverged, its loss is not finite" in words
    assert "silent for 12 s" in words
    state.take(step_row(301, 1021.0))  # it answers again
    assert "silent" not in drawn(state, now=1021.0)


@pytest.mark.parametrize("width", [60, 80, 200])
def test_no_line_is_wider_than_the_terminal(state: RunState, width: int) -> None:
    assert max(map(len, drawn(state, 1020.0, width).splitlines())) <= width


def test_labelling_has_no_students_and_needs_none() -> None:
    state = RunState("label")
    row = {"kind": "step", "step": 500, "of": 2000, "images": 1, "totals": {"asked": 400, "from_store": 100}, "note": ""}
    state.take({**row, "time": 0.0})
    words = drawn(state, now=10.0)
    assert "500 of 2,000" in words
    assert "20% from the store" in words
    assert "student" not in words


class TestShares:
    def test_they_add_up_and_nothing_is_no_share(self) -> None:
        assert shares_of({"student": 3.0, "teacher": 1.0}) == {"student": 0.75, "decode": 0.0, "teacher": 0.25, "store": 0.0}
        assert shares_of({"student": 0.0}) == {}
        assert shares_of({"student": 1.0, "decode": -0.001})["decode"] == 0.0  # clocks

    def test_the_bar_is_full_whatever_the_rounding(self) -> None:
        for shares in ({"student": 1 / 3, "decode": 1 / 3, "teacher": 1 / 3, "store": 0.0}, shares_of({"student": 1.0, "store": 200.0})):
            assert share_bar(shares, width=20).plain.splitlines()[0] == "█" * 20

    def test_parts_are_as_long_as_their_shares(self) -> None:
        bar = share_bar({"student": 0.5, "decode": 0.25, "teacher": 0.25, "store": 0.0}, width=8)
        assert [span.end - span.start for span in bar.spans[:3]] == [4, 2, 2]


def console_to(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> io.StringIO:
    text = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=text, force_terminal=terminal, width=100, highlight=False, soft_wrap=True))
    if terminal:
        monkeypatch.setattr("distill.live_view.console", progress.console)
    return text


def test_a_log_gets_a_line_now_and_then_and_one_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    text = console_to(monkeypatch, terminal=False)
    monkeypatch.setattr(progress, "PLAIN_EVERY_S", 0.0)
    line = RowLine("distill")
    line.show(step_row(100, 1000.0))
    line.show(step_row(300, 1020.0))
    line.close(failed=False)
    first, *_, last = text.getvalue().splitlines()
    assert first.startswith("  distill: 10000/100000 images, ")
    assert "loss big 0.412" in first
    assert last.startswith("  distill: 100000 images in ")
    assert "\x1b" not in text.getvalue()


def test_a_run_that_ended_early_says_how_far_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    """All students stopped at step 400 of 1000, which only the checkpoint tells: the last `step` row was before it."""
    text = console_to(monkeypatch, terminal=False)
    with RowLine("distill") as line:
        line.show(step_row(100, 1000.0))
        line.show({"kind": "checkpoint", "time": 1010.0, "step": 200, "epoch": 0})
        line.show(step_row(390, 1020.0))
        line.show({"kind": "checkpoint", "time": 1021.0, "step": 400, "epoch": 1})
    assert text.getvalue().splitlines()[-1].startswith("  distill: 40000 images in ")


def test_a_terminal_gets_the_picture_and_keeps_one_line_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    text = console_to(monkeypatch, terminal=True)
    line = RowLine("distill")
    line.show(step_row(100, 1000.0))
    line.show(step_row(300, 1020.0))
    line.close(failed=False)
    assert "agreement" in text.getvalue()
    assert "\x1b[2K" in text.getvalue()  # lines erased: the picture is gone at the end
    assert "distill: 100000 images in " in text.getvalue().splitlines()[-1]


def test_stages_without_totals_keep_their_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    text = console_to(monkeypatch, terminal=True)
    line = RowLine("pretrain")
    line.show({"kind": "step", "step": 1, "of": 10, "images": 64, "note": "loss 2.31"})
    line.show({"kind": "step", "step": 5, "of": 10, "images": 64, "note": "loss 2.01"})
    line.close(failed=True)
    assert "loss 2.01" in text.getvalue()
    assert "from the store" not in text.getvalue()


def test_where_every_unit_is_told_nothing_is_added_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """1990 of 2000 labels: ten images could not be used."""
    text = console_to(monkeypatch, terminal=False)
    with RowLine("label", exact=True) as line:
        for done in (500, 1990):
            line.show({"kind": "step", "step": done, "of": 2000, "images": 1, "totals": {}, "note": f"{done} asked for"})
    assert text.getvalue().startswith("  label: 1990 images in ")
    assert text.getvalue().endswith("1990 asked for\n")
