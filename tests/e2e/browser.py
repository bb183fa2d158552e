"""A real Chromium, and pages in it that note whatever must not happen."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 360, "height": 700}


@contextmanager
def running_browser() -> Iterator[Browser]:
    """Skips where there is no Chromium or nothing to drive it with."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.skip("no browser: playwright is not installed (it is in the extra `test`)")
    path = next(filter(None, map(shutil.which, CHROMIUMS)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(CHROMIUMS)} is on PATH")
    with sync_playwright() as playwright:
        # Tests also run as root, in containers with little /dev/shm.
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        )
        yield browser
        browser.close()


class Watch:
    """What a page said and whom it asked. `expected`: words of console errors that the test causes on purpose."""

    def __init__(self, page: Page, origin: str) -> None:
        self.errors: list[str] = []
        self.elsewhere: list[str] = []
        self.expected: tuple[str, ...] = ()
        self._origin = origin
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", self._on_request)

    def _on_console(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(message.text)

    def _on_request(self, request: Any) -> None:
        if not request.url.startswith(self._origin + "/"):
            self.elsewhere.append(request.url)

    def assert_clean(self) -> None:
        """No violation of the policy, no error, no other host."""
        assert [each for each in self.errors if not any(words in each for words in self.expected)] == []
        assert self.elsewhere == []


Visit = Callable[..., "tuple[Page, Watch]"]


@contextmanager
def visits(browser: Browser) -> Iterator[Visit]:
    """visit(url, **context options) opens a page of its own; at the end each must have been clean."""
    opened: list[tuple[Any, Watch]] = []

    def visit(url: str, **options: Any) -> tuple[Page, Watch]:
        context = browser.new_context(**({"viewport": DESKTOP} | options))
        page = context.new_page()
        watch = Watch(page, url)
        opened.append((context, watch))
        page.goto(url)
        return page, watch

    try:
        yield visit
        for _, watch in opened:
            watch.assert_clean()
    finally:
        for context, _ in opened:
            context.close()
