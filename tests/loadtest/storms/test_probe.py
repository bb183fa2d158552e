"""The probe of another process."""

from __future__ import annotations

import http.server
import threading
import time

from loadtest.storms.probe import probing


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._answer(200 if self.path == "/health" else 404)

    def do_POST(self) -> None:
        time.sleep(0.05)
        self._answer(200 if self.rfile.read(int(self.headers["content-length"])) == b"{}" else 400)

    def _answer(self, status: int) -> None:
        self.send_response(status)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        return


def test_probe_times_answers_and_counts_those_that_are_not_200() -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever).start()
    port = server.server_address[1]
    try:
        with probing(port) as good, probing(port, "/other") as bad, probing(port, "/x", "{}") as slow:
            time.sleep(0.5)
    finally:
        server.shutdown()
        server.server_close()
    assert len(good.seconds) > 2
    assert good.failures == 0
    assert bad.failures == len(bad.seconds) > 2
    assert slow.failures == 0
    assert min(slow.seconds) > 0.05
    with probing(port) as nobody:
        time.sleep(0.2)
    assert nobody.failures == len(nobody.seconds) > 0
