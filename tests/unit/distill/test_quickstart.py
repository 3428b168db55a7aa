"""The one request that the quickstart shows, to a real gateway."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from distill.cli import quickstart
from teacher_server.fake import FakeTeacher
from teacher_server.serve import Gateway
from teacher_server.settings import ServerSettings


def shown(images: list[bytes], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    records = [SimpleNamespace(image_id=f"{number}.png", data=data) for number, data in enumerate(images)]
    monkeypatch.setattr(quickstart, "open_labelled", lambda *arguments: SimpleNamespace(read_shard=lambda number: records))
    run: Any = SimpleNamespace(file=SimpleNamespace(data=SimpleNamespace(test=None)))
    with Gateway(FakeTeacher, ServerSettings(auth="none", port=0)) as gateway:
        quickstart.show_one_request(run, gateway.url)
    said = capsys.readouterr()
    return said.out + said.err


def test_a_damaged_test_image_does_not_end_the_quickstart(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    text = shown([b"\x89PNG damaged", file.getvalue()], monkeypatch, capsys)
    assert "cannot use 0.png" in text
    assert "@1.png" in text
    assert "class_names" in text
    text = shown([b"damaged"] * 9, monkeypatch, capsys)
    assert "none of the first 5 test images" in text
