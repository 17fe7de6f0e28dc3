"""The errors that a user can mend, and what their messages are made of."""

from collections.abc import Sequence

MAX_MESSAGE = 2_000
"""How many characters of a message are kept: a value that is shown in it can be as long as a file."""


class UserError(ValueError):
    """Something the user asked for cannot be done; the message says what, and how to mend it, in one sentence."""

    def __init__(self, message: str) -> None:
        if len(message) > MAX_MESSAGE:
            message = " ".join(w if len(w) < 300 else f"{w[:200]}...{w[-50:]}" for w in message.split(" "))
        if len(message) > MAX_MESSAGE:
            message = f"{message[: MAX_MESSAGE * 3 // 4]} ... {message[-MAX_MESSAGE // 4 :]}"
        super().__init__(message)


class ConfigError(UserError):
    """A run file or setting that cannot be used; the message names the field, the value and the fix."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, as part of a sentence; its type if it has none."""
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")


def listed(names: Sequence[str], at_most: int) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return ", ".join(names[:at_most]) + more


REPORT_BUG = "This is a bug of sae-lens-matryoshka; please report it with the traceback above."
"""What is said of errors that are not a :class:`UserError`."""
