"""Arguments that several commands take, and the values of arguments."""

import argparse
import math
from argparse import ArgumentTypeError

from sae_lens_matryoshka.errors import UserError


def add_run_file_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what changes a run file, and what it may do, to a command that takes one."""
    parser.add_argument(
        "--set", dest="settings", action="append", default=[], metavar="KEY.SUB=VALUE",
        help="change a field, repeatable; one of several SAEs goes by its name: saes.NAME.k=40",
    )  # fmt: skip
    parser.add_argument(
        "--unset", action="append", default=[], metavar="KEY.SUB",
        help="take a field out of the run file, before --set, repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--trust-remote-code", action="store_true",
        help="let the run file's trust_remote_code run code that comes with a model or data set",
    )  # fmt: skip


def finite_number(text: str) -> float:
    """A number of the command line that is neither infinite nor NaN.

    Raises:
        ArgumentTypeError: If it is none.
    """
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ArgumentTypeError(f"{text!r} is no finite number")
    return number


def positive_count(text: str) -> int:
    """A whole number of the command line above 0.

    Raises:
        ArgumentTypeError: If it is none.
    """
    if not text.replace("_", "").isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is no whole number above 0, as 50_000")
    return int(text)


def parse_widths(text: str) -> list[int]:
    """Widths as the command line takes them, ``2048,6144,65536``.

    Raises:
        UserError: If they are not whole numbers separated by commas.
    """
    try:
        return [int(width) for width in text.split(",")]
    except ValueError:
        raise UserError(f"--widths {text!r} must be whole numbers separated by commas, as 2048,6144,65536.") from None
