"""The page at `/` in a real Chromium, before the real gateway on a real port; the teacher's logits are known, so every bar can be checked.

Unit of data: one visit. Playwright drives the system's Chromium and brings no browser of its own.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, FilePayload, Locator, Page, Request, Route, expect, sync_playwright

from teacher_server.fake import FakeTeacher, fake_logits
from teacher_server.key_file import KeyFile, new_key, write_keys
from teacher_server.serve import Gateway
from teacher_server.settings import ServerSettings, TenantQuota

pytestmark = pytest.mark.integration

ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
NUM_CLASSES = 30
NUM_BARS = 10
STORE_VIOLATIONS = (
    "addEventListener('securitypolicyviolation', e => (window.violations ??= []).push(`${e.violatedDirective} ${e.blockedURI}`))"
)
OUTLINED = """() => {
    const active = document.activeElement;
    const shown = active.id === 'files' ? document.querySelector('.dropzone') : active;
    return getComputedStyle(shown).outlineStyle !== 'none' || active.classList.contains('skip');
}"""


def grey_png(value: int, name: str) -> FilePayload:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(buffer, "PNG")
    return {"name": name, "mimeType": "image/png", "buffer": buffer.getvalue()}


def logits_of(value: int, num_classes: int = NUM_CLASSES) -> NDArray[np.float64]:
    """What the fake teacher says of `grey_png(value)`, as JSON carries it: 7 significant digits."""
    crops_BHWC = np.full((1, 8, 8, 3), value, np.uint8)
    return np.array([float(f"{logit:.7g}") for logit in fake_logits(crops_BHWC, num_classes)[0]])


def softmax(logits_K: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    exp_K = np.exp((logits_K - logits_K.max()) / temperature)
    return exp_K / exp_K.sum()


def entropy(probs_K: NDArray[np.float64]) -> float:
    return float(-(probs_K * np.log2(probs_K)).sum())


@pytest.fixture(scope="module")
def chromium() -> str:
    """The system's Chromium, installed if it is missing; skipped only where there is no package manager to do that."""
    names = ("chromium", "chromium-browser", "google-chrome")
    if not any(map(shutil.which, names)) and shutil.which("apt-get") and os.geteuid() == 0:
        subprocess.run(["apt-get", "-qq", "update"], check=True, timeout=300)
        subprocess.run(["apt-get", "-qq", "install", "-y", "--no-install-recommends", "chromium"], check=True, timeout=900)
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None and shutil.which("apt-get") is None:
        pytest.skip("there is no Chromium here; install Chromium or Chrome to test the page")
    assert found, "the page is tested in Chromium: apt-get install chromium"
    return found


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=list(ARGUMENTS))
        yield browser
        browser.close()


@pytest.fixture
def serve() -> Iterator[Callable[..., Gateway]]:
    """Starts gateways that end with the test."""
    with ExitStack() as stack:

        def start(teacher: FakeTeacher, **settings: Any) -> Gateway:
            return stack.enter_context(Gateway(lambda: teacher, ServerSettings(**{"port": 0, "auth": "none", **settings})))

        yield start


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    context = browser.new_context(viewport={"width": 1280, "height": 900}, reduced_motion="reduce")
    context.set_default_timeout(20_000)
    context.add_init_script(STORE_VIOLATIONS)
    yield context
    context.close()


class Visit:
    """One page with all that it asked for, and what the browser complained about."""

    def __init__(self, context: BrowserContext, url: str) -> None:
        self.url = url
        self.page: Page = context.new_page()
        self.requests: list[Request] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request))
        self.page.on("console", self._said)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(url)

    def _said(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def asked(self, path: str) -> int:
        """Requests for this path so far."""
        return sum(urlsplit(request.url).path == path for request in self.requests)

    def add(self, *files: FilePayload) -> None:
        self.page.set_input_files("#files", list(files))

    def card(self, name: str) -> Locator:
        return self.page.locator(".result").filter(has=self.page.get_by_role("heading", name=name, exact=True))

    def labelled(self, name: str) -> Locator:
        """The card, once its bars are there."""
        card = self.card(name)
        expect(card).to_have_attribute("data-state", "done")
        return card

    def end_clean(self) -> None:
        """Nothing left the host, nothing broke the policy, nothing was complained about."""
        hosts = {urlsplit(request.url).netloc for request in self.requests if not request.url.startswith("blob:")}
        assert hosts == {urlsplit(self.url).netloc}
        assert self.page.evaluate("window.violations ?? []") == []
        assert self.complaints == []


@pytest.fixture
def visit(context: BrowserContext) -> Callable[[Gateway], Visit]:
    return lambda gateway: Visit(context, gateway.url)


def bars(card: Locator) -> list[tuple[str, list[float], list[str], list[float]]]:
    """(name, probabilities, their words, widths of the bars in percent) of each row."""
    rows = card.locator("tbody tr").evaluate_all(
        """rows => rows.map(row => {
            const shown = selector => [...row.querySelectorAll(selector)].filter(element => !element.hidden);
            return [
                row.querySelector('.name').textContent,
                shown('data').map(data => Number(data.value)),
                shown('data').map(data => data.textContent),
                shown('.bar').map(bar => 100 * bar.firstElementChild.getBoundingClientRect().width / bar.getBoundingClientRect().width),
            ];
        })"""
    )
    return [(name, probs, words, widths) for name, probs, words, widths in rows]


def fact(card: Locator, name: str) -> list[float]:
    values = card.locator(f"[data-fact={name}] data").evaluate_all("all => all.filter(d => !d.hidden).map(d => Number(d.value))")
    return [float(value) for value in values]


def check_bars(card: Locator, value: int, *temperatures: float) -> None:
    """The bars of `grey_png(value)` are softmax(logits / T), largest first, the others summed; the words say the same, rounded."""
    logits_K = logits_of(value)
    order = sorted(range(NUM_CLASSES), key=lambda k: (-logits_K[k], k))
    probs = [softmax(logits_K, temperature) for temperature in temperatures]
    rows = bars(card)
    assert [row[0] for row in rows] == [*(f"class {k}" for k in order[:NUM_BARS]), f"{NUM_CLASSES - NUM_BARS} others"]
    expected = [[p[k] for p in probs] for k in order[:NUM_BARS]] + [[p[order[NUM_BARS:]].sum() for p in probs]]
    np.testing.assert_allclose([row[1] for row in rows], expected, rtol=1e-9)
    for _, values, words, widths in rows:
        for prob, word, width in zip(values, words, widths, strict=True):
            if word.startswith("< "):
                assert prob < 1e-4
            else:
                assert float(word.removesuffix(" %")) == pytest.approx(100 * prob, abs=0.051)
            assert width == pytest.approx(100 * prob, abs=1.5)  # a bar of nothing is still 2 px
    np.testing.assert_allclose(fact(card, "entropy"), [entropy(p) for p in probs], rtol=1e-9)
    np.testing.assert_allclose(fact(card, "top"), [p.max() for p in probs], rtol=1e-9)


def test_bars_are_the_softmax_of_the_logits_and_the_slider_asks_nothing(serve: Any, visit: Any) -> None:
    here = visit(serve(FakeTeacher(NUM_CLASSES)))
    here.add(grey_png(40, "grey.png"))
    card = here.labelled("grey.png")
    check_bars(card, 40, 1)

    slider = here.page.get_by_role("slider", name="Temperature")
    number = here.page.get_by_label("Temperature A as a number")
    slider.focus()
    entropies = fact(card, "entropy")
    for _ in range(15):
        here.page.keyboard.press("ArrowRight")
        entropies += fact(card, "entropy")
    assert (np.diff(entropies) > 0).all()
    assert float(number.input_value()) == pytest.approx(10**0.3, rel=0.005)  # 15 steps of 10^0.02
    assert slider.get_attribute("aria-valuetext") == number.input_value()
    check_bars(card, 40, float(number.input_value()))
    here.page.keyboard.press("End")
    assert float(number.input_value()) == 20
    here.page.keyboard.press("Home")
    assert float(number.input_value()) == 0.1
    check_bars(card, 40, 0.1)

    number.fill("7.25")
    check_bars(card, 40, 7.25)
    top = int(logits_of(40).argmax())
    expect(here.page.get_by_role("status")).to_have_text(f"grey.png: class {top} {100 * softmax(logits_of(40), 7.25).max():.1f} %.")
    for wrong in ("0", "-3", "101", ""):
        number.fill(wrong)
        expect(number).to_have_attribute("aria-invalid", "true")
        check_bars(card, 40, 7.25)
    number.blur()
    assert number.input_value() == "7.25"
    assert here.asked("/v1/soft-labels") == 1
    here.end_clean()


def test_two_temperatures_are_compared(serve: Any, visit: Any) -> None:
    here = visit(serve(FakeTeacher(NUM_CLASSES)))
    here.add(grey_png(200, "a.png"), grey_png(90, "b.png"))
    here.labelled("a.png")
    here.page.get_by_role("switch", name="Compare two temperatures").press("Space")
    here.page.get_by_label("Temperature A as a number").fill("0.5")
    here.page.get_by_label("Temperature B as a number").fill("6")
    for name, value in (("a.png", 200), ("b.png", 90)):
        card = here.labelled(name)
        check_bars(card, value, 0.5, 6)
        first, second = (softmax(logits_of(value), temperature) for temperature in (0.5, 6))
        distance = np.abs(first - second).sum() / 2
        assert fact(card, "variation") == pytest.approx([distance], rel=1e-9)
        assert card.locator("[data-fact=variation]").inner_text().split()[-1] == f"{distance:.3f}"
    here.page.get_by_role("switch").press("Space")
    check_bars(here.card("a.png"), 200, 0.5)
    expect(here.card("a.png").locator("[data-fact=variation]")).to_be_hidden()
    assert here.asked("/v1/soft-labels") == 2
    here.end_clean()


def test_a_corrupt_image_is_named_and_the_other_is_answered(serve: Any, visit: Any) -> None:
    here = visit(serve(FakeTeacher(NUM_CLASSES)))
    good = grey_png(10, "good.png")
    files = [("good.png", list(good["buffer"])), ("broken.png", list(good["buffer"][:40]))]
    transfer = here.page.evaluate_handle(
        """files => {
            const transfer = new DataTransfer();
            for (const [name, bytes] of files) transfer.items.add(new File([new Uint8Array(bytes)], name, {type: 'image/png'}));
            return transfer;
        }""",
        files,
    )
    here.page.dispatch_event(".dropzone", "drop", {"dataTransfer": transfer})
    check_bars(here.labelled("good.png"), 10, 1)
    broken = here.card("broken.png")
    expect(broken).to_have_attribute("data-state", "failed")
    expect(broken.locator(".message")).to_contain_text("truncated")
    expect(broken.get_by_role("button", name="Try again")).to_be_visible()
    assert len(here.complaints) == 1  # the browser itself reports the 422
    broken.get_by_role("button", name="Remove broken.png").click()
    expect(here.page.locator(".result")).to_have_count(1)


def test_trying_again_twice_asks_once(serve: Any, visit: Any) -> None:
    here = visit(serve(FakeTeacher(NUM_CLASSES)))
    here.add({"name": "broken.png", "mimeType": "image/png", "buffer": b"\x89PNG broken"})
    again = here.card("broken.png").get_by_role("button", name="Try again")
    expect(again).to_be_visible()
    held: list[Route] = []
    here.page.route("**/v1/soft-labels*", lambda route: route.continue_() if len(held) == 3 else held.append(route))
    for value in (10, 20, 30):  # as many as are asked at once
        with here.page.expect_request("**/v1/soft-labels*"):
            here.add(grey_png(value, f"{value}.png"))
    again.click()
    again.click()
    for route in held:
        route.continue_()
    here.add(grey_png(40, "last.png"))
    for name in ("10.png", "20.png", "30.png", "last.png"):
        here.labelled(name)
    expect(again).to_be_visible()
    assert len([request for request in here.requests if "/v1/soft-labels" in request.url]) == 6


def test_images_can_be_pasted(serve: Any, visit: Any) -> None:
    here = visit(serve(FakeTeacher(NUM_CLASSES)))
    here.page.evaluate(
        """bytes => {
            const clipboardData = new DataTransfer();
            clipboardData.items.add(new File([new Uint8Array(bytes)], 'image.png', {type: 'image/png'}));
            document.body.dispatchEvent(new ClipboardEvent('paste', {clipboardData, bubbles: true}));
        }""",
        list(grey_png(77, "")["buffer"]),
    )
    check_bars(here.labelled("image.png"), 77, 1)
    here.end_clean()


def test_the_key_is_asked_for_kept_in_the_tab_and_sent_as_bearer(serve: Any, visit: Any, tmp_path: Path) -> None:
    key, entry = new_key("alice")
    write_keys(tmp_path / "keys.yaml", KeyFile(keys=(entry,)))
    here = visit(serve(FakeTeacher(NUM_CLASSES), auth="keys", keys_file=str(tmp_path / "keys.yaml")))
    page = here.page
    field = page.get_by_label("API key", exact=True)
    expect(field).to_be_visible()
    here.add(grey_png(40, "grey.png"))
    expect(here.card("grey.png").locator(".message")).to_contain_text("wants an API key")

    field.fill("ключ")  # no header can carry it: the browser would not even ask
    field.press("Enter")
    expect(page.locator("#key-note")).to_contain_text("characters that no key has")
    expect(field).to_be_visible()
    field.fill(key[:-1] + ("A" if key[-1] != "A" else "B"))
    field.press("Enter")
    expect(page.locator("#key-note")).to_have_text("The server does not know this key.")
    field.fill(key)
    field.press("Enter")
    check_bars(here.labelled("grey.png"), 40, 1)
    expect(field).to_be_hidden()
    expect(page.locator("#model-name")).to_have_text("fake")
    expect(page.locator("#live")).not_to_have_class(re.compile("stale"))

    asked = [request for request in here.requests if "/v1/soft-labels" in request.url]
    assert asked[-1].headers["authorization"] == f"Bearer {key}"
    assert not any(key in request.url for request in here.requests)
    assert page.evaluate("[localStorage.length, document.cookie, Object.values(sessionStorage)]") == [0, "", [key]]

    page.reload()
    expect(page.locator("#model-name")).to_have_text("fake")
    page.get_by_role("button", name="API key").click()
    page.get_by_role("button", name="Forget").click()
    expect(page.locator("#key-note")).to_have_text("This server answers only with an API key.")
    assert page.evaluate("sessionStorage.length") == 0


def test_a_key_entered_while_an_answer_to_the_old_one_is_on_its_way_is_used(serve: Any, visit: Any, tmp_path: Path) -> None:
    key, entry = new_key("alice")
    write_keys(tmp_path / "keys.yaml", KeyFile(keys=(entry,)))
    here = visit(serve(FakeTeacher(NUM_CLASSES), auth="keys", keys_file=str(tmp_path / "keys.yaml")))
    held: list[Route] = []
    here.page.route("**/v1/soft-labels*", lambda route: route.continue_() if held else held.append(route))
    field = here.page.get_by_label("API key", exact=True)
    with here.page.expect_request("**/v1/soft-labels*"):
        here.add(grey_png(40, "grey.png"))
    field.fill(key)
    field.press("Enter")
    expect(here.page.locator("#model-name")).to_have_text("fake")
    held[0].continue_()
    check_bars(here.labelled("grey.png"), 40, 1)
    expect(field).to_be_hidden()


def test_what_is_too_large_or_of_another_kind_is_said_on_its_card(serve: Any, visit: Any) -> None:
    here = visit(serve(FakeTeacher(), max_body_bytes=1024))
    here.add(
        {"name": "large.png", "mimeType": "image/png", "buffer": bytes(5000)},
        {"name": "moving.gif", "mimeType": "image/gif", "buffer": b"GIF89a"},
    )
    expect(here.card("large.png").locator(".message")).to_contain_text("larger than this server takes")
    expect(here.card("large.png").locator(".message")).to_contain_text("1024 bytes")
    expect(here.card("moving.gif").locator(".message")).to_contain_text("Send JPEG, PNG or WebP")


def test_a_teacher_that_is_away_is_waited_for(serve: Any, visit: Any) -> None:
    teacher = FakeTeacher(NUM_CLASSES, unavailable_calls=10**9)
    here = visit(serve(teacher))
    expect(here.page.locator("#readiness")).to_have_text("Teacher away")
    here.add(grey_png(40, "grey.png"))
    expect(here.card("grey.png").locator(".message")).to_have_text(re.compile(r"The teacher does not answer now.*Tries again in \d+ s"))
    teacher.unavailable_calls = 0
    check_bars(here.labelled("grey.png"), 40, 1)
    expect(here.page.locator("#readiness")).to_have_text("Ready")


def test_a_quota_is_waited_for(serve: Any, visit: Any) -> None:
    here = visit(serve(FakeTeacher(NUM_CLASSES), quota=TenantQuota(images_per_s=0.7, burst_s=1)))
    here.add(grey_png(40, "first.png"), grey_png(80, "second.png"))
    expect(here.page.locator(".message").filter(has_text=re.compile(r"quota.*Tries again in \d+ s"))).to_have_count(1)
    check_bars(here.labelled("first.png"), 40, 1)
    check_bars(here.labelled("second.png"), 80, 1)


def test_class_names_are_text_whatever_is_in_them(serve: Any, visit: Any) -> None:
    teacher = FakeTeacher(3)
    names = ("<img src=x onerror=alert(1)>", "</script><script>alert(2)</script>", "\u202eevil & 'quoted' \"name\" " + "long" * 40)
    teacher._served = teacher._served.model_copy(update={"class_names": names})
    here = visit(serve(teacher))
    here.page.on("dialog", lambda dialog: pytest.fail(f"a script ran: {dialog.message}"))
    here.page.set_viewport_size({"width": 360, "height": 740})
    here.add(grey_png(40, "<b>bold</b>.png"))
    card = here.labelled("<b>bold</b>.png")
    assert sorted(row[0] for row in bars(card)) == sorted(names)
    here.page.locator("#model summary").click()
    expect(here.page.locator("#model li")).to_have_count(3)
    assert here.page.locator("#model li").all_text_contents() == list(names)
    assert here.page.locator("img[src=x], .result b").count() == 0
    assert here.page.evaluate("document.documentElement.scrollWidth") <= 360
    here.end_clean()


def test_the_copied_command_answers_what_the_page_shows(serve: Any, visit: Any, context: BrowserContext) -> None:
    gateway = serve(FakeTeacher(NUM_CLASSES))
    here = visit(gateway)
    context.grant_permissions(["clipboard-read", "clipboard-write"], origin=gateway.url)
    file = grey_png(123, 'it\'s $(a) "cat".png')
    here.add(file)
    card = here.labelled(file["name"])
    here.page.get_by_label("Temperature A as a number").fill("3.5")
    card.get_by_role("button", name="Copy curl").click()
    expect(card.get_by_role("button", name="Copied")).to_be_visible()
    program, *words = shlex.split(here.page.evaluate("navigator.clipboard.readText()"))
    assert program == "curl"
    assert words[words.index("--data-binary") + 1] == "@./" + file["name"]
    name, value = words[words.index("-H") + 1].split(": ")
    item = httpx.post(words[0], content=file["buffer"], headers={name: value}).raise_for_status().json()["items"][0]
    shown = bars(card)[:NUM_BARS]
    assert item["class_names"] == [row[0] for row in shown]
    np.testing.assert_allclose(item["values"], [row[1][0] for row in shown], rtol=1e-5)

    card.get_by_role("button", name="Copy JSON").click()
    expect(here.page.get_by_role("status")).to_have_text("Copied.")
    answer = json.loads(here.page.evaluate("navigator.clipboard.readText()"))
    assert answer["kind"] == "logits"
    assert answer["items"][0]["values"] == logits_of(123).tolist()
    here.page.get_by_role("button", name="Copy the whole fingerprint").click()
    here.page.wait_for_function("async () => (await navigator.clipboard.readText()) === 'f'.repeat(64)")
    here.end_clean()


def test_the_gateway_is_watched_only_while_somebody_looks(serve: Any, visit: Any, context: BrowserContext) -> None:
    context.clock.install()
    here = visit(serve(FakeTeacher(NUM_CLASSES)))
    page = here.page
    tile = page.locator("[data-series=images]")
    for value in (40, 80, 120):
        here.add(grey_png(value, f"{value}.png"))
        here.labelled(f"{value}.png")

    def asked_within(seconds: int) -> int:
        """Questions for the numbers while so many seconds pass in the browser."""
        before = here.asked("/v1/stats")
        for _ in range(seconds):
            page.clock.run_for(1000)
            page.evaluate("fetch('healthz').then(answer => answer.text())")  # real time for an answer, after which the next is asked for
        return here.asked("/v1/stats") - before

    for _ in range(3):
        with page.expect_request_finished(lambda request: request.url.endswith("/v1/stats")):
            page.clock.run_for(1000)
    expect(page.locator("#live .note")).to_contain_text("3 images, 3 requests, 0 refused, 0 failed")
    expect(tile.locator(".number")).not_to_have_text("–")
    assert page.locator("#live .sparkline .line").first.get_attribute("d")

    hide = "hidden => { Object.defineProperty(document, 'hidden', {value: hidden, configurable: true});"
    page.evaluate(hide + " document.dispatchEvent(new Event('visibilitychange')); }", True)
    assert asked_within(20) == 0
    with page.expect_request("**/v1/stats"):
        page.evaluate(hide + " document.dispatchEvent(new Event('visibilitychange')); }", False)
    page.get_by_role("button", name="Pause").press("Enter")
    assert asked_within(20) == 0
    here.end_clean()


def test_everything_is_reached_with_the_tab_key_and_seen_to_be(serve: Any, visit: Any) -> None:
    here = visit(serve(FakeTeacher(NUM_CLASSES)))
    page = here.page
    here.add(grey_png(40, "grey.png"))
    here.labelled("grey.png")
    expect(page.locator("#model-name")).to_have_text("fake")
    page.get_by_role("switch").check()
    page.evaluate("document.activeElement.blur(); window.scrollTo(0, 0); window.seen = new Set()")
    wanted = page.evaluate(
        """() => {
            window.wanted = [...document.querySelectorAll('a[href], button, input, summary')].filter(e => e.checkVisibility());
            return window.wanted.length;
        }"""
    )
    assert wanted >= 15
    for _ in range(wanted + 5):
        page.keyboard.press("Tab")
        name = page.evaluate("() => { seen.add(document.activeElement); return document.activeElement.outerHTML.slice(0, 80); }")
        assert page.evaluate("document.activeElement === document.body") or page.evaluate(OUTLINED), f"no visible focus on {name}"
    missed = page.evaluate("wanted.filter(e => !seen.has(e)).map(e => e.outerHTML.slice(0, 80))")
    assert missed == []
    unnamed = page.evaluate("wanted.filter(e => !(e.ariaLabel || e.labels?.length || e.textContent.trim())).map(e => e.outerHTML)")
    assert unnamed == []
    here.end_clean()


def test_a_second_visit_takes_the_files_from_the_cache_and_works(serve: Any, visit: Any) -> None:
    here = visit(serve(FakeTeacher(NUM_CLASSES)))
    expect(here.page.locator("#model-name")).to_have_text("fake")
    answer = here.page.goto(here.url)
    assert answer is not None
    assert answer.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
    here.add(grey_png(40, "grey.png"))
    check_bars(here.labelled("grey.png"), 40, 1)
    here.end_clean()
