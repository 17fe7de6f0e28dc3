"""Values of the command line's arguments."""

import math

from sae_lens_matryoshka.errors import UserError


def finite_number(text: str) -> float:
    """A number of the command line that is neither infinite nor NaN.

    Raises:
        ValueError: If it is none.
    """
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def positive_count(text: str) -> int:
    """A whole number of the command line above 0.

    Raises:
        ValueError: If it is none.
    """
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def parse_widths(text: str) -> list[int]:
    """Widths as the command line takes them, ``2048,6144,65536``.

    Raises:
        UserError: If they are not whole numbers separated by commas.
    """
    try:
        return [int(width) for width in text.split(",")]
    except ValueError:
        raise UserError(f"--widths {text!r} must be whole numbers separated by commas, as 2048,6144,65536.") from None
