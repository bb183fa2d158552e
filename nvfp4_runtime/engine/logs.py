"""How both processes write their logs: lines for people, or a JSON object a line for machines. Torch-free."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

LOG_FORMATS = ("text", "json")
TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
FIELDS = "fields"  # logger.info(text, extra={FIELDS: {...}}): a record's facts, as keys of the JSON object
TAIL = "tail"  # the same facts in words, where the message does not say them


class JsonFormatter(logging.Formatter):
    """One object a record: time (RFC 3339, UTC, milliseconds), level, logger, message, the record's fields, exception.

    `constant` fields are in every object.
    """

    def __init__(self, **constant: str) -> None:
        super().__init__()
        self._constant = constant

    def format(self, record: logging.LogRecord) -> str:
        """One line: whatever a message holds, json escapes its line ends."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        found: dict[str, Any] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self._constant,
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            found["exception"] = self.formatException(record.exc_info)
        return json.dumps(found, ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """Lines for people: a record's `tail`, if it has one, stands behind its message."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return super().formatMessage(record) + str(getattr(record, TAIL, ""))


def configure_logs(form: str, level: int | str, text: str = TEXT, **constant: str) -> None:
    """This process's log to stderr, in one of LOG_FORMATS; `text` is the format of lines for people."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(**constant) if form == "json" else TextFormatter(text))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.captureWarnings(form == "json")
