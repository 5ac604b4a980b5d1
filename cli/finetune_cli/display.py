"""What a run looks like while it goes on: a live table on a terminal, a line for every change anywhere else."""

import os
import sys
import time
from datetime import UTC, datetime
from types import TracebackType
from typing import IO, TYPE_CHECKING, Protocol, Self

from finetune_api.status import JobStatus, StageState
from finetune_cli import words

if TYPE_CHECKING:
    from rich.table import Table


class View(Protocol):
    """Shows one run."""

    def __enter__(self) -> Self:
        """Begin."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the terminal as it was."""

    def show(self, status: JobStatus) -> None:
        """The status as it is now; cheap when nothing has changed."""

    def say(self, text: str) -> None:
        """Something that stays to be read."""


def view(stream: IO[str], title: str) -> View:
    """The right one for where the output goes; NO_COLOR takes the colours only."""
    return LiveView(stream, title) if stream.isatty() and os.environ.get("TERM") != "dumb" else PlainView(stream)


class PlainView:
    """One line per change, with the time, for files, pipes and CI."""

    _PROGRESS_SECONDS = 15.0

    def __init__(self, stream: IO[str] = sys.stderr) -> None:
        self._stream = stream
        self._shown: dict[str, tuple[object, ...]] = {}
        self._progress_at: dict[str, float] = {}

    def __enter__(self) -> Self:
        """Nothing to prepare."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to restore."""

    def show(self, status: JobStatus) -> None:
        """A line for each stage that changed; for mere progress at most one every 15 s."""
        now = datetime.now(UTC)
        for stage in status.stages:
            state = (stage.state, stage.reason, stage.message, stage.attempt)
            moved = stage.state is StageState.RUNNING and stage.progress is not None and stage.progress.total_steps > 0
            due = moved and time.monotonic() - self._progress_at.get(stage.name, 0.0) >= self._PROGRESS_SECONDS
            if self._shown.get(stage.name) == state and not due:
                continue
            self._shown[stage.name] = state
            if stage.state in (StageState.WAITING, StageState.PENDING):  # the next line says more
                continue
            if moved:
                self._progress_at[stage.name] = time.monotonic()
            _, name, steps, loss, eta, took, note = words.stage_row(stage, now)
            parts = [name, steps, loss and f"loss {loss}", eta and f"ETA {eta}", took if stage.state.done else "", note]
            self.say(f"{stage.name:<12} " + "  ".join(filter(None, parts)))

    def say(self, text: str) -> None:
        """Every line with the local time before it."""
        stamp = time.strftime("%H:%M:%S")
        for line in text.splitlines():
            print(f"{stamp} {line}", file=self._stream, flush=True)


_COLOURS = {
    StageState.RUNNING: "cyan",
    StageState.COMPLETE: "green",
    StageState.REUSED: "green",
    StageState.FAILED: "red",
    StageState.RETRYING: "yellow",
    StageState.SUSPENDED: "yellow",
}


class LiveView:
    """A table that is redrawn in place, twice a second so that the clock moves."""

    def __init__(self, stream: IO[str], title: str) -> None:
        from rich.console import Console
        from rich.live import Live

        self._title = title
        self._status = JobStatus()
        self._live = Live(
            get_renderable=self._table,
            console=Console(file=stream, highlight=False),
            refresh_per_second=2,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def __enter__(self) -> Self:
        """Start drawing."""
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The last state stays on the screen."""
        self._live.stop()

    def show(self, status: JobStatus) -> None:
        """Drawn at the next refresh."""
        self._status = status

    def say(self, text: str) -> None:
        """Above the table, where it stays."""
        self._live.console.print(text, markup=False)

    def _table(self) -> "Table":
        from rich.table import Table
        from rich.text import Text

        table = Table(
            title=f"{self._title}: {self._status.summary or 'starting'}", title_justify="left", box=None, pad_edge=False
        )
        for column in words.STAGE_COLUMNS:
            table.add_column(
                column.upper(), justify="right" if column in ("step", "loss", "eta", "elapsed") else "left"
            )
        now = datetime.now(UTC)
        for stage in self._status.stages:
            row = words.stage_row(stage, now)
            table.add_row(row[0], Text(row[1], style=_COLOURS.get(stage.state, "")), *map(Text, row[2:]))
        return table
