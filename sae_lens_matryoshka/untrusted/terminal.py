"""Printing text that may be somebody else's: as text, never as markup, and never as orders to the terminal."""

import logging
import os
from typing import Any

from rich.console import Console
from rich.text import Text
from typing_extensions import override

COLUMNS_ELSEWHERE = 160
"""How wide tables may be where there is no terminal: rich would take 80, and cut numbers off."""


def printable(text: str) -> str:
    r"""A text with everything that cannot be seen written out, such as ``\x1b`` for the escapes of terminals.

    Also what turns the direction of writing, and halves of characters, which cannot be printed at all.
    """
    if text.isprintable():
        return text
    return "".join(
        character if character in "\n\t" or character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


class PlainConsole(Console):
    """A console that prints what it is given as it stands, in tables and their titles too."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, "highlight": False, **options})
        if not self.is_terminal and "COLUMNS" not in os.environ:
            self.width = COLUMNS_ELSEWHERE

    @override
    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)


class PlainFormatter(logging.Formatter):
    """Log messages as they stand, without orders to the terminal."""

    @override
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))
