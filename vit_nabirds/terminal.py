"""What is shown on a terminal below the lines of the log while something takes long. Elsewhere nothing is."""

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from vit_nabirds.errors import PROXY

REFRESHED = 2  # times a second
Item = TypeVar("Item")


def can_show() -> bool:
    """Whether something can be drawn, and nothing is yet."""
    return sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb" and not hasattr(sys.stderr, PROXY)


@contextlib.contextmanager
def shown_below(drawn: Callable[[], RenderableType]) -> Iterator[None]:
    """While entered, a terminal has what `drawn` returns as its last lines, which log lines, warnings and messages
    scroll past. The cursor stays visible, so that nothing is left to restore when the process is killed."""
    if not can_show():
        yield
        return
    stderr, console = sys.stderr, Console(file=sys.stderr, soft_wrap=True, highlight=False)
    live = Live(
        get_renderable=drawn, console=console, refresh_per_second=REFRESHED, transient=True, redirect_stdout=False
    )
    handlers = [h for h in logging.getLogger("vit_nabirds").handlers if getattr(h, "stream", None) is stderr]
    live.start()
    console.show_cursor(True)
    for handler in handlers:
        handler.setStream(sys.stderr)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # the terminal may be gone
            live.stop()
        sys.stderr = stderr
        for handler in handlers:
            handler.setStream(stderr)


class Speed(ProgressColumn):
    def render(self, task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.{0 if speed >= 10 else 1}f} {task.fields['unit']}/s")


def progress(items: Iterable[Item], total: int, unit: str, what: str = "", done: int = 0) -> Iterator[Item]:
    """The items after the first `done`, counted by a bar on a terminal: progress(found, 880, "images", "cropping")."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Speed(), TimeRemainingColumn())
    bar = Progress(*columns, auto_refresh=False, console=Console(stderr=True))  # drawn by `shown_below`
    task = bar.add_task(what, total=total, completed=done, unit=unit)
    with shown_below(bar.get_renderable):
        for item in items:
            yield item
            bar.advance(task)
