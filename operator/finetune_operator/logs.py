"""One JSON object a line on standard error; what a record has of job, stage and attempt stands in it."""

import json
import logging
import sys
from datetime import UTC, datetime

_FIELDS = ("job", "stage", "attempt")


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            **{name: getattr(record, name) for name in _FIELDS if hasattr(record, name)},
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def configure(level: str) -> None:
    """Send our own messages from ``level`` up to standard error, libraries' from WARNING up."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for name in ("finetune", "finetune_operator"):
        logging.getLogger(name).setLevel(level)
