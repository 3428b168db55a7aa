"""The files of the page over in-process ASGI: which, with which headers, and nothing else of the disk."""

from __future__ import annotations

import asyncio
import io
import re
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from teacher_server.fake import FakeTeacher
from teacher_server.gateway import create_app
from teacher_server.page import FILES, FOLDER
from teacher_server.settings import ServerSettings


def ask(*requests: tuple[str, str, dict[str, Any]]) -> list[httpx.Response]:
    """(method, path, further arguments), one after another, to a fresh gateway."""

    async def scenario() -> list[httpx.Response]:
        transport = httpx.ASGITransport(create_app(FakeTeacher(), ServerSettings(auth="none")))
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            return [await client.request(method, path, **arguments) for method, path, arguments in requests]

    return asyncio.run(scenario())


def get(path: str, **headers: str) -> httpx.Response:
    return ask(("GET", path, {"headers": {name.replace("_", "-"): value for name, value in headers.items()}}))[0]


def test_the_list_is_what_is_in_the_folder() -> None:
    assert sorted(FILES) == sorted(path.name for path in FOLDER.iterdir())


@pytest.mark.parametrize("name", FILES)
def test_every_file_comes_whole_with_its_type(name: str) -> None:
    answer = get(f"/static/{name}")
    assert answer.status_code == 200
    assert answer.content == (FOLDER / name).read_bytes()
    kind = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}[name.rpartition(".")[2]]
    assert answer.headers["content-type"].partition(";")[0] == kind
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-cache"


def test_the_page_is_at_the_root_and_its_files_are_those_it_names() -> None:
    page = get("/")
    assert page.content == (FOLDER / "index.html").read_bytes()
    named = set(re.findall(r'(?:src|href)="static/([^"]+)"', page.text))
    imported = {name for file in FOLDER.glob("*.js") for name in re.findall(r"from '\./([^']+)'", file.read_text())}
    assert named | imported | {"index.html"} == set(FILES)


def test_the_browser_may_run_and_ask_nothing_but_ours() -> None:
    policy = dict(part.strip().partition(" ")[::2] for part in get("/").headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["img-src"] == "'self' blob: data:"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"


def test_nothing_in_the_files_needs_more_than_the_policy_gives() -> None:
    page = (FOLDER / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son[a-z]+=|javascript:", page)
    for file in FOLDER.iterdir():
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")  # the name of a format, not an address
        assert not re.search(r"https?://|//cdn|@import|\burl\(", text), file.name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), file.name


def colours(css: str, dark: bool) -> dict[str, str]:
    light, night = css.split("@media (prefers-color-scheme: dark)")
    return dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6});", light.partition("}")[0] + (night.partition("}")[0] if dark else "")))


def contrast(first: str, second: str) -> float:
    """WCAG 2.2: (lighter + 0.05) / (darker + 0.05) of the relative luminances."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    darker, lighter = sorted((luminance(first), luminance(second)))
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_text_and_bars_have_enough_contrast(dark: bool) -> None:
    named = colours((FOLDER / "style.css").read_text(), dark)
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    text = [(colour, ground) for colour in ("text", "muted", "a", "b", "bad") for ground in ("ground", "card", "sunken")]
    text += [("card", "a"), ("card", "b"), ("a", "a-soft"), ("muted", "a-soft")]
    parts = [("rest", "card"), ("rest", "sunken"), ("good", "card"), ("a", "sunken"), ("b", "sunken")]
    wanted = {**dict.fromkeys(parts, 3.0), **dict.fromkeys(text, 4.5)}
    short = {pair: round(found, 2) for pair, least in wanted.items() if (found := contrast(named[pair[0]], named[pair[1]])) < least}
    assert short == {}


def test_an_unchanged_file_is_not_sent_again_and_keeps_its_policy() -> None:
    first = get("/")
    again = get("/", if_none_match=first.headers["etag"])
    assert (again.status_code, again.content) == (304, b"")
    # The browser updates what it kept with these headers.
    assert again.headers["content-security-policy"] == first.headers["content-security-policy"]
    assert again.headers["etag"] == first.headers["etag"]
    assert get("/", if_none_match='"an-older-one", W/' + first.headers["etag"]).status_code == 304
    assert get("/", if_none_match='"an-older-one"').status_code == 200
    assert get("/static/app.js", if_none_match=first.headers["etag"]).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/static/",
        "/static/page.py",
        "/static/../page.py",
        "/static/..%2fpage.py",
        "/static/%2e%2e/page.py",
        "/static/..%5cpage.py",
        "/static/%2fetc%2fpasswd",
        "/static//etc/passwd",
        "/static/app.js%00",
        "/static/APP.JS",
        "/static/app.js/",
    ],
)
def test_nothing_else_is_served(path: str) -> None:
    (answer,) = ask(("GET", path, {}))
    assert answer.status_code == 404
    assert set(answer.json()) == {"error"}


def test_only_reading_is_allowed_and_head_says_what_get_would() -> None:
    head, post, whole = ask(("HEAD", "/", {}), ("POST", "/", {}), ("GET", "/", {}))
    assert (head.status_code, post.status_code) == (200, 405)
    assert head.headers["content-length"] == str(len(whole.content))


def test_the_stats_count_what_was_asked() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(buffer, "PNG")
    png = {"content": buffer.getvalue(), "headers": {"content-type": "image/png"}}
    gif = {"content": b"GIF89a", "headers": {"content-type": "image/gif"}}
    before, *_, after = ask(
        ("GET", "/v1/stats", {}),
        ("POST", "/v1/soft-labels", png),
        ("POST", "/v1/soft-labels", png),
        ("POST", "/v1/soft-labels", gif),
        ("GET", "/v1/models", {}),
        ("GET", "/v1/stats", {}),
    )
    assert (before.json()["requests"], before.json()["images"]) == (0, 0)
    stats = after.json()
    assert (stats["requests"], stats["images"], stats["refused"], stats["failed"], stats["in_flight"]) == (3, 2, 1, 0, 0)
    assert sum(stats["series"]["images"]) == 2
    assert stats["latency_ms"]["p50"] > 0
    assert after.headers["cache-control"] == "no-store"
