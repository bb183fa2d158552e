"""The page at / in a real Chromium, on a real server process with a simulated model.

Every page that a test opens must end without an error in its console, without a violation of its content security
policy, and without a request to another host.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.e2e.browser import DESKTOP, PHONE, Visit, running_browser, visits
from tests.e2e.conftest import Launch, LiveServer

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

SAID = "Here is **bold** and `code`:\n\n```python\nprint(1 < 2)\n```\n\n- one\n- two\n\nEnd. "
HOSTILE = (
    '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script> '
    "**<svg onload=window.hacked=1>** [a](javascript:window.hacked=1) `<b>`\n\n"
    '```"><script>window.hacked=1</script>\n</code></pre><script>window.hacked=1</script>\n```\n\n'
    '- <iframe srcdoc="<script>parent.hacked=1</script>"></iframe>\n\n# <a href=javascript:hacked=1>x</a>\n\n'
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_browser() as browser:
        yield browser


@pytest.fixture
def visit(browser: Browser) -> Iterator[Visit]:
    with visits(browser) as visit:
        yield visit


@pytest.fixture(scope="module")
def server(launch: Launch, browser: Browser) -> Iterator[LiveServer]:
    started = launch(
        "--simulate", "--simulate-script", SAID, "--simulate-step-seconds", "0.01", "--num-kv-blocks", "400"
    )
    yield started
    started.kill()


@pytest.fixture
def page(visit: Visit, server: LiveServer) -> Page:
    page, _ = visit(server.url)
    page.wait_for_selector("#health[data-state=ready]")
    return page


def limit_tokens(page: Page, count: int) -> None:
    page.click("#tab-settings")
    page.fill("#max-tokens", str(count))


def ask(page: Page, text: str = "Hello") -> None:
    page.fill("#message", text)
    page.keyboard.press("Enter")


def until(page: Page, expression: str) -> None:
    """Playwright's own wait_for_function evaluates strings in the page, which its policy forbids."""
    deadline = time.monotonic() + 30
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, f"never true: {expression}"
        page.wait_for_timeout(20)


def wait_for_end(page: Page) -> None:
    page.wait_for_selector("#stop", state="hidden")


def test_a_message_is_answered_and_seen_while_it_streams(page: Page) -> None:
    limit_tokens(page, 150)
    ask(page, "Say <b>this</b>")
    until(page, "document.querySelectorAll('.assistant .content strong').length > 0")
    assert page.is_visible("#stop"), "text is there before the end"
    assert page.get_attribute(".assistant", "aria-busy") == "true"
    wait_for_end(page)
    assert page.inner_text(".user .typed") == "Say <b>this</b>"
    assert page.inner_text(".assistant .content strong >> nth=0") == "bold"
    assert page.inner_text(".assistant .content pre >> nth=0") == "print(1 < 2)"
    assert page.locator(".assistant .content li").all_inner_texts()[:2] == ["one", "two"]
    assert page.get_attribute(".assistant", "aria-busy") is None
    stats = page.inner_text(".assistant .stats")
    assert "150 tokens" in stats
    assert "length limit" in stats


def test_the_conversation_is_sent_with_the_settings(page: Page) -> None:
    bodies: list[dict[str, Any]] = []
    page.on("request", lambda r: bodies.append(json.loads(r.post_data)) if "chat/completions" in r.url else None)
    limit_tokens(page, 8)
    page.fill("#temperature", "0.5")
    page.fill("#system", "Be short.")
    ask(page, "One")
    wait_for_end(page)
    page.fill("#temperature", "7")  # out of range: left out
    page.fill("#max-tokens", "")
    page.fill("#max-tokens", "4")
    ask(page, "Two")
    wait_for_end(page)
    first, second = bodies
    assert (first["temperature"], first["max_tokens"], first["model"]) == (0.5, 8, "simulated")
    assert first["messages"] == [{"role": "system", "content": "Be short."}, {"role": "user", "content": "One"}]
    assert "temperature" not in second
    assert [turn["role"] for turn in second["messages"]] == ["system", "user", "assistant", "user"]
    assert second["messages"][2]["content"] == SAID[:8]
    page.click("#clear")
    assert page.locator(".turn").count() == 0
    assert page.is_visible("#empty")


@pytest.mark.parametrize("how", ["Escape", "button"])
def test_cancel_ends_the_request_in_the_engine_too(page: Page, server: LiveServer, how: str) -> None:
    ask(page)
    page.wait_for_selector(".assistant .content p")
    assert server.metric("vllm:num_requests_running") == 1
    if how == "Escape":
        page.keyboard.press("Escape")
    else:
        page.click("#stop")
    wait_for_end(page)
    server.assert_idle()
    assert "stopped" in page.inner_text(".assistant .stats")
    assert page.evaluate("document.activeElement.id") == "message"
    ended = httpx.get(f"{server.url}/requests").json()["data"][0]
    assert ended["finish_reason"] == "abort"


def test_everything_is_done_by_keyboard_alone(page: Page, server: LiveServer) -> None:
    press = page.keyboard.press
    assert page.evaluate("document.activeElement.id") == "message"
    page.keyboard.type("One")
    press("Shift+Enter")
    page.keyboard.type("line")
    assert page.input_value("#message") == "One\nline"
    press("Enter")
    page.wait_for_selector(".assistant .content p")
    press("Escape")
    wait_for_end(page)
    seen = []
    for _ in range(12):
        press("Tab")
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", "the focus is seen"
        seen.append(page.evaluate("document.activeElement.id"))
        if seen[-1] == "tab-live":
            break
    assert seen == ["clear", "send", "tab-live"]
    press("ArrowRight")
    assert page.is_visible("#panel-requests")
    press("End")
    assert page.evaluate("document.activeElement.id") == "tab-settings"
    press("Tab")
    press("Tab")
    assert page.evaluate("document.activeElement.id") == "model"
    press("Tab")
    page.keyboard.type("Be kind.")
    assert page.input_value("#system") == "Be kind."
    page.focus(".skip")
    press("Enter")
    assert page.evaluate("document.activeElement.id") == "message"


def test_hostile_output_stays_text(visit: Visit, launch: Launch) -> None:
    server = launch("--simulate", "--simulate-script", HOSTILE)
    page, _ = visit(server.url)
    page.wait_for_selector("#health[data-state=ready]")
    limit_tokens(page, 2 * len(HOSTILE))
    ask(page, HOSTILE)
    wait_for_end(page)
    page.wait_for_timeout(200)
    assert page.evaluate("window.hacked") is None
    assert page.locator("#log").locator("img, script, iframe, svg, a, b").count() == 0
    assert 'onerror="window.hacked=1"' in page.inner_text(".assistant .content")
    server.kill()


def test_long_lines_of_marks_do_not_hold_up_the_page(page: Page) -> None:
    milliseconds = page.evaluate(
        """async () => {
            const { blocksOf, elementOf } = await import("/ui/markdown.js");
            const started = performance.now();
            for (const part of ["*a ", "**a ", "`", "` `` ", "***", "- ", "> ", "#", "*a **b `c "]) {
                blocksOf(part.repeat(20000)).forEach((block) => elementOf(block));
                blocksOf((part + "\\n").repeat(2000)).forEach((block) => elementOf(block));
            }
            return performance.now() - started;
        }"""
    )
    assert milliseconds < 10_000, milliseconds


def test_quantiles_are_those_of_the_histograms_growth(page: Page) -> None:
    found = page.evaluate(
        """async () => {
            const { parse, histogram, growth, quantileOf, total } = await import("/ui/prometheus.js");
            const scrape = (a, b, c) => parse(`# HELP x y\nx_bucket{le="1",m="a\\\\"b"} ${a}
x_bucket{le="2",m="a"} ${b}
x_bucket{le="+Inf",m="a"} ${c}\nx_sum{m="a"} 9\nup{k="1"} 2\nup{k="2"} 3`);
            const [old, now] = [scrape(5, 5, 5), scrape(5, 15, 15)].map((s) => histogram(s, "x"));
            return [
                quantileOf(growth(now, old), 0.5), quantileOf(old, 0.5),
                quantileOf(histogram(scrape(0, 0, 4), "x"), 0.5),
                quantileOf(growth(now, now), 0.5), growth(old, now).counts, total(scrape(1, 1, 1), "up"),
                total(scrape(1, 1, 1), "up", { k: "2" }), histogram(scrape(1, 1, 1), "y"),
                scrape(1, 1, 1).get("x_bucket")[0].labels.m,
            ];
        }"""
    )
    assert found == [
        {"value": 1.5}, {"value": 1, "bound": "<"}, {"value": 2, "bound": ">"}, None, [5, 5, 5], 5, 3, None, 'a"b',
    ]  # fmt: skip


def test_live_figures_and_the_tables_follow_what_happens(page: Page, server: LiveServer) -> None:
    limit_tokens(page, 250)
    page.click("#tab-live")
    ask(page)
    until(page, "document.getElementById('running').textContent === '1'")
    until(page, "Number(document.getElementById('rate-generation').textContent) > 5")
    until(page, "Number(document.getElementById('kv-meter').getAttribute('aria-valuenow')) > 0")
    wait_for_end(page)
    until(page, "document.getElementById('running').textContent === '0'")
    for name in ("ttft-50", "ttft-95", "own-ttft-50", "own-itl-95", "itl-95"):
        assert "ms" in page.inner_text(f"#{name}"), name
    label = page.get_attribute("#chart-throughput svg", "aria-label")
    assert label is not None
    assert label.startswith("Tokens per second, last 5 minutes; now generated")
    assert page.get_attribute("#chart-throughput .line", "d")
    page.hover("#chart-load svg")
    assert "running" in page.inner_text("#chart-load .readout")
    page.click("#tab-requests")
    page.wait_for_selector("tr.ours")
    cells = page.locator("#requests tr >> nth=0").locator("th, td").all_inner_texts()
    assert "→ 250" in cells[1]
    assert cells[-1] == "length limit"
    page.click("#tab-precision")
    report = httpx.get(f"{server.url}/v1/precision").json()
    assert page.locator("#precision tr:not(.reason)").count() == len(report["layers"]) + (report["head"] is not None)
    assert report["numerics_reason"] in page.inner_text("#precision-note")


def test_thinking_is_folded_and_not_sent_back(visit: Visit, launch: Launch) -> None:
    script = "<think>Hm, <i>well</i>.</think>\n\nYes."
    server = launch("--simulate", "--simulate-script", script, "--reasoning-parser", "qwen3")
    page, _ = visit(server.url)
    page.wait_for_selector("#health[data-state=ready]")
    bodies: list[str] = []
    page.on("request", lambda r: bodies.append(r.post_data or "") if "chat/completions" in r.url else None)
    for _ in range(2):
        limit_tokens(page, 38)
        ask(page)
        wait_for_end(page)
    assert page.text_content(".thought >> nth=0") == "Hm, <i>well</i>."
    assert not page.is_visible(".thought >> nth=0")
    page.click("summary >> nth=0")
    assert page.is_visible(".thought >> nth=0")
    assert "Yes." in page.inner_text(".assistant .content >> nth=0")
    assert "well" not in bodies[1]
    assert "Yes." in bodies[1]
    server.kill()


def test_a_keyed_server_is_asked_with_the_key_that_the_user_gives(visit: Visit, launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("open-sesame\n")
    server = launch("--simulate", "--api-key-file", str(tmp_path / "keys"))
    page, watch = visit(server.url)
    watch.expected = ("401",)
    page.wait_for_selector("#key-dialog[open]")
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    until(page, "document.getElementById('key-error').textContent.includes('did not accept')")
    page.fill("#key", "open-sesame")
    page.keyboard.press("Enter")
    page.wait_for_selector("#health[data-state=ready]")
    limit_tokens(page, 5)
    ask(page)
    wait_for_end(page)
    assert "5 tokens" in page.inner_text(".assistant .stats")
    assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
    page.click("#forget-key")
    page.wait_for_selector("#key-dialog[open]")
    assert page.evaluate("sessionStorage.length") == 0
    server.kill()


@pytest.mark.parametrize(
    ("status", "headers", "words"),
    [
        (429, {"retry-after": "7"}, "The server is full: too many requests are waiting. Try again in 7 s."),
        (503, {}, "The model is not running. The server says: why it is so"),
        (400, {}, "The server refused the request. The server says: why it is so"),
        (500, {}, "Something went wrong on the server. The server says: why it is so"),
    ],
)
def test_refusals_are_told_in_plain_words_and_tried_again(
    visit: Visit, server: LiveServer, status: int, headers: dict[str, str], words: str
) -> None:
    page, watch = visit(server.url)
    watch.expected = (str(status),)
    error = {"error": {"message": "why it is so", "type": "x", "param": None, "code": status}}
    page.route("**/v1/chat/completions", lambda r: r.fulfill(status=status, headers=headers, json=error), times=1)
    limit_tokens(page, 5)
    ask(page)
    page.wait_for_selector(".turn .error")
    assert page.inner_text(".turn .error") == words
    page.click("button:has-text('Try again')")
    until(page, "document.querySelector('.assistant .stats')?.textContent.includes('5 tokens')")
    assert page.locator(".turn").count() == 2


def test_an_error_event_and_a_stream_that_breaks_off_are_told(visit: Visit, server: LiveServer) -> None:
    page, _ = visit(server.url)
    chunk = {"choices": [{"index": 0, "delta": {"content": "Half"}}], "usage": {"completion_tokens": 1}}
    event = {"error": {"message": "not finite", "code": 500}}
    for body, words in (
        (f"data: {json.dumps(chunk)}\n\ndata: {json.dumps(event)}\n\ndata: [DONE]\n\n", "not finite"),
        (f"data: {json.dumps(chunk)}\n\n", "ended in the middle"),
    ):
        page.route(
            "**/v1/chat/completions",
            lambda r, _, body=body: r.fulfill(body=body, content_type="text/event-stream"),
            times=1,
        )
        ask(page)
        page.wait_for_selector(f".turn .error:has-text('{words}')")
    assert page.inner_text(".assistant .content >> nth=0") == "Half"


def test_the_death_of_the_engine_is_told_the_next_one_answers_and_a_dead_server_is_seen(
    visit: Visit, launch: Launch
) -> None:
    server = launch("--simulate", "--simulate-step-seconds", "0.02")
    page, watch = visit(server.url)
    watch.expected = ("Failed to load resource",)
    page.wait_for_selector("#health[data-state=ready]")
    ask(page)
    page.wait_for_selector(".assistant .content p")
    os.kill(server.engine_pid(), signal.SIGKILL)
    page.wait_for_selector(".turn .error")
    deadline = time.monotonic() + 20
    while httpx.get(f"{server.url}/health", timeout=5).status_code != 200:
        assert time.monotonic() < deadline, "no new engine"
        time.sleep(0.1)
    limit_tokens(page, 8)
    ask(page)
    wait_for_end(page)
    server.kill()
    page.wait_for_selector("#health[data-state=down]")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_axe_finds_nothing_and_nothing_scrolls_sideways(
    visit: Visit, server: LiveServer, scheme: Any, size: dict[str, int]
) -> None:
    sync_axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="no browser test tool: axe is missing"
    )
    page, _ = visit(server.url, viewport=size, color_scheme=scheme, reduced_motion="reduce")
    page.wait_for_selector("#health[data-state=ready]")
    limit_tokens(page, 200)
    if size == PHONE:
        page.click("#tab-chat")
    ask(page, "x" * 400)
    wait_for_end(page)
    views = ["chat"] * (size == PHONE) + ["live", "requests", "precision", "settings"]
    for view in views:
        page.click(f"#tab-{view}")
        page.wait_for_timeout(50)
        found = sync_axe.Axe().run(page)
        assert found.violations_count == 0, f"{view}: {found.generate_report()}"
        width, inner = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert width <= inner, view
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == (
        "rgb(16, 19, 18)" if scheme == "dark" else "rgb(245, 246, 244)"
    )
