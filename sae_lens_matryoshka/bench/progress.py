"""Progress bars of evaluations, shown although what SAEBench prints is dropped (see ``upstream.contained``)."""

import sys
from contextvars import ContextVar
from typing import Any, TextIO

from tqdm.auto import tqdm

shown_stderr: ContextVar[TextIO | None] = ContextVar("shown_stderr", default=None)
"""Where bars go while standard error is dropped."""


def progress_bar(total: int, description: str, unit: str) -> "tqdm[Any]":
    """A bar for one part of an evaluation, which shows where it takes longer than a second.

    Args:
        total: How many there are.
        description: What is being done.
        unit: What is counted.
    """
    return tqdm(
        total=total, desc=description, unit=f" {unit}", unit_scale=True, leave=False, delay=1, mininterval=0.5,
        file=shown_stderr.get() or sys.stderr,
    )  # fmt: skip
