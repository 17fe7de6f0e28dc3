"""Ctrl-C and SIGTERM at moments that leave nothing half done."""

import os
import signal
import sys
import threading
from types import FrameType

from typing_extensions import Self


class Stopping:
    """While the block lasts, Ctrl-C and SIGTERM are a KeyboardInterrupt: at once, or at the next :meth:`check`.

    The first waits for a check once there has been one, since from then on there are more; a second comes at once.
    """

    def __init__(self) -> None:
        self._waits = self._asked = self._stops = False

    def __enter__(self) -> Self:
        numbers = (signal.SIGINT, signal.SIGTERM)
        if threading.current_thread() is not threading.main_thread():  # which alone gets signals
            numbers = ()
        self._previous = {number: signal.signal(number, self._ask) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Stop here if that has been asked for.

        Raises:
            KeyboardInterrupt: If it has.
        """
        self._waits = True
        if self._asked:
            self._stops = True  # and what is said then is not cut short
            raise KeyboardInterrupt

    def _ask(self, signal_number: int, frame: FrameType | None) -> None:
        if self._stops:
            return
        if not self._waits or self._asked:
            raise KeyboardInterrupt
        self._asked = True
        # print and logging may be in the middle of a line of their own
        line = b"\nStopping after the batch or file in hand; once more stops at once.\n"
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, line)
