"""Progress bars that show signs of life: drawn anew every two seconds, or a line every half minute without a terminal.

tqdm draws a bar when it is moved, so that one which waits for a slow step stands still; and where there is no terminal
it writes every move into the same endless line. All bars of the process are meant: ours, SAELens's and SAEBench's.
"""

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from sae_lens_matryoshka.untrusted.terminal import PlainFormatter

SECONDS_ON_A_TERMINAL = 2.0
SECONDS_ELSEWHERE = 30.0


class LivingProgressBars:
    """Draws the bars of a command that takes long, from :meth:`start` to :meth:`stop`."""

    def __init__(self) -> None:
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._as_lines: AbstractContextManager[None] = nullcontext()

    def start(self) -> None:
        """Begin; imports tqdm, so call it when a command has been checked. A second start does nothing."""
        if self._thread is not None:
            return
        is_terminal = sys.stderr.isatty()
        self._as_lines = nullcontext() if is_terminal else _bars_as_lines()
        self._as_lines.__enter__()
        self._stopping.clear()
        self._thread = threading.Thread(target=self._run, args=(is_terminal,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Leave the bars to tqdm again."""
        if self._thread is not None:
            self._stopping.set()
            self._thread.join()
            self._thread = None
            self._as_lines.__exit__(None, None, None)

    def _run(self, is_terminal: bool) -> None:
        while not self._stopping.wait(SECONDS_ON_A_TERMINAL if is_terminal else SECONDS_ELSEWHERE):
            draw_again() if is_terminal else write_line()


PROGRESS_BARS = LivingProgressBars()
"""Those of this process: started when a command begins its long work, stopped when it ends."""


def draw_again() -> None:
    """Draw all bars that are shown, so that their times move."""
    from tqdm import tqdm

    with tqdm.get_lock():
        for bar in _shown_bars():
            bar.refresh(nolock=True)


def write_line() -> None:
    """Write the state of all bars on one line, the outermost first."""
    from tqdm import tqdm

    with tqdm.get_lock():
        bars = _shown_bars()
        line = " | ".join(map(str, bars))
    if line:  # where the outermost bar goes: standard error may be dropped meanwhile, as where SAEBench runs
        print(line, file=bars[0].fp, flush=True)


def _shown_bars() -> list[Any]:
    from tqdm import tqdm

    bars = [bar for bar in list(tqdm._instances) if time.time() >= bar.start_t + bar.delay]  # pyright: ignore[reportAttributeAccessIssue]
    return sorted(bars, key=lambda bar: abs(bar.pos))


@contextmanager
def _bars_as_lines() -> Iterator[None]:
    """Have bars write nothing by themselves but their last state, if they are of those that stay."""
    from tqdm import tqdm

    def display(bar: Any, msg: str | None = None, pos: int | None = None) -> bool:
        del pos
        if bar.disable and msg is None:  # it is being closed; tqdm ends the line
            bar.fp.write(str(bar))
            return True
        return False

    def clear(bar: Any, nolock: bool = False) -> None:
        del bar, nolock

    originals = tqdm.display, tqdm.clear
    tqdm.display, tqdm.clear = display, clear  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        tqdm.display, tqdm.clear = originals


@contextmanager
def progress_messages() -> Iterator[None]:
    """Show this package's messages beside the progress bars; SAELens's own say no more than it lets them."""
    from tqdm.contrib.logging import logging_redirect_tqdm

    package, handler = logging.getLogger("sae_lens_matryoshka"), logging.StreamHandler()
    handler.setFormatter(PlainFormatter())
    level = package.level
    package.setLevel(logging.INFO)
    package.addHandler(handler)
    try:
        with logging_redirect_tqdm([package]):
            yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level)
