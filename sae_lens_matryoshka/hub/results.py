"""Benchmark results for a model card: the rows of ``results.csv`` that belong to an SAE, and the figures beside it."""

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sae_lens_matryoshka.errors import UserError

RESULTS_FILENAME = "results.csv"


@dataclass(frozen=True)
class Results:
    """What benchmarks have found about one SAE."""

    rows: list[dict[str, str]]
    """Rows with at least ``metric`` and ``value``, and where recorded ``evaluation``, ``level``, ``width``."""

    figures: list[Path]
    """PNG files, by name."""


def read_results(folder: str | Path, names: Iterable[str], only_sae: bool) -> Results:
    """Read the results of one SAE from a folder of results.

    Args:
        folder: The folder with ``results.csv`` and figures.
        names: What the SAE may be called in the table's ``sae`` column: its id, its folder.
        only_sae: Whether it is the only SAE to be published; a table about one SAE is then its table, whatever that
            is called there.

    Raises:
        UserError: If there is no table, it lacks ``metric`` or ``value``, or has no row about the SAE.
    """
    folder = Path(folder)
    path = folder / RESULTS_FILENAME
    if not path.is_file():
        raise UserError(f"There are no results in {folder} (no {RESULTS_FILENAME}).")
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows = [{key: value or "" for key, value in row.items() if key} for row in reader]
            columns = reader.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    missing = [column for column in ("metric", "value") if column not in columns]
    if missing:
        raise UserError(f"{path} is not a table of results: it has no column {' and no column '.join(missing)}.")
    called = {row["sae"] for row in rows if row.get("sae")}
    if called and not (only_sae and len(called) == 1):
        names = set(names)
        rows = [row for row in rows if row.get("sae") in names]
        if not rows:
            raise UserError(
                f"{path} has results about {', '.join(sorted(called))}, but none about {' or '.join(sorted(names))}."
            )
    return Results(rows, sorted(folder.glob("*.png")))
