"""One JSON object a line on standard error, each with job, stage and attempt."""

import json
import logging
import sys
from datetime import UTC, datetime

from finetune_api.stage import StageRun


class _Json(logging.Formatter):
    def __init__(self, run: StageRun) -> None:
        super().__init__()
        self._fixed = {"job": f"{run.job.namespace}/{run.job.name}", "stage": run.stage, "attempt": run.attempt}

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {
            "time": time,
            "level": record.levelname.lower(),
            "logger": record.name,
            **self._fixed,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def configure(run: StageRun, level: int = logging.INFO) -> None:
    """Send everything from ``level`` up to standard error; libraries speak from WARNING up only."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json(run))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("finetune").setLevel(level)
    logging.captureWarnings(True)
