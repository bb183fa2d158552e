"""The screen of `nvfp4 top`, by Textual: four panels, a sparkline, the precision report; a scrape each interval."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, ClassVar

from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.widgets import Footer, HelpPanel, Sparkline, Static

from server.top import figures
from server.top.scrape import Change, Scrape, ScrapeError, Server

HISTORY = 120  # intervals of the sparkline
PERCENTILE_INTERVALS = 30  # latencies are of so many: one interval has few observations


class Top(App[None]):
    """A running server's load, refreshed every `interval` seconds. What cannot be read is said in the status line."""

    CSS = """
    .panel { border: round $primary; padding: 0 1; height: auto; min-height: 8; width: 1fr; }
    #sparkline { height: 3; margin: 0 2; }
    #precision { border: round $primary; padding: 0 1; height: auto; }
    #status { height: 1; padding: 0 1; }
    #status.failed { background: $error; color: $text; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "quit"),
        Binding("p", "pause", "pause or go on"),
        Binding("question_mark,h", "help", "keys", key_display="?"),
    ]

    def __init__(self, server: Server, interval: float = 1.0) -> None:
        super().__init__()
        self._server = server
        self._interval = interval
        self._scrapes: deque[Scrape] = deque(maxlen=PERCENTILE_INTERVALS + 1)
        self._throughput: deque[float] = deque([0.0] * HISTORY, maxlen=HISTORY)
        self._report: dict[str, Any] | None = None
        self.paused = False

    def compose(self) -> ComposeResult:
        yield Static(f"{self._server.url}: connecting", id="status", markup=False)
        with VerticalScroll():
            with Horizontal(classes="row"):
                yield self._panel("throughput")
                yield self._panel("load")
            yield Sparkline([], id="sparkline", summary_function=max)
            with Horizontal(classes="row"):
                yield self._panel("latency")
                yield self._panel("phases")
            yield Static("", id="precision", markup=False)
        yield Footer()

    @staticmethod
    def _panel(name: str) -> Static:
        panel = Static("", id=name, classes="panel", markup=False)
        panel.border_title = name
        return panel

    def on_mount(self) -> None:
        for row in self.query(Horizontal):
            row.styles.height = "auto"
        self.query_one("#precision").border_title = "precision"
        self.run_worker(self._watch(), exclusive=True)

    async def _watch(self) -> None:
        while True:
            if not self.paused:
                await self.refresh_figures()
            await asyncio.sleep(self._interval)

    async def refresh_figures(self) -> None:
        """One scrape, shown."""
        try:
            if self._report is None:
                self._report = await asyncio.to_thread(self._server.precision)
            scrape = await asyncio.to_thread(self._server.scrape)
        except ScrapeError as error:
            self._report = None  # whoever answers next may be another server
            self._say(str(error), failed=True)
            return
        if self.paused:
            return
        self._scrapes.append(scrape)
        self._show(scrape)

    def _show(self, now: Scrape) -> None:
        assert self._report is not None
        last = Change(self._scrapes[-2] if len(self._scrapes) > 1 else now, now)
        longer = Change(self._scrapes[0], now)
        self._throughput.append(last.rate("vllm:generation_tokens_total"))
        self.query_one("#sparkline", Sparkline).data = list(self._throughput)
        self._fill("throughput", figures.throughput_lines(last))
        self._fill("load", figures.load_lines(last))
        self._fill("latency", figures.latency_lines(longer))
        self._fill("phases", figures.phase_lines(longer))
        self._fill("precision", figures.precision_lines(self._report))
        self._say(f"{self._server.url}  {self._report['model']}  every {self._interval:g} s")

    def _fill(self, name: str, lines: list[str]) -> None:
        self.query_one(f"#{name}", Static).update("\n".join(lines))

    def _say(self, text: str, failed: bool = False) -> None:
        status = self.query_one("#status", Static)
        status.update(text)
        status.set_class(failed, "failed")

    def action_pause(self) -> None:
        """Stop asking the server, or go on."""
        self.paused = not self.paused
        if self.paused:
            self._say("paused: p goes on")

    def action_help(self) -> None:
        """Show or hide what the keys do."""
        if self.query(HelpPanel):
            self.action_hide_help_panel()
        else:
            self.action_show_help_panel()
