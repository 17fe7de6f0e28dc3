"""Benchmark results for a model card: the rows of ``results.csv`` that belong to an SAE, and the figures beside it."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sae_lens_matryoshka.errors import UserError
from sae_lens_matryoshka.hub.own_files import check_own_file
from sae_lens_matryoshka.untrusted.csv_tables import read_csv

RESULTS_FILENAME = "results.csv"


@dataclass(frozen=True)
class Results:
    """What benchmarks have found about one SAE."""

    rows: list[dict[str, str]]
    """Rows with ``metric`` and ``value``, and where recorded ``evaluation``, ``level``, ``width``, else empty."""

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
        UserError: If there is no table, it lacks ``metric`` or ``value`` or has no row about the SAE, or if it or a
            figure is a link out of the folder.
    """
    folder = Path(folder)
    path = folder / RESULTS_FILENAME
    if not path.exists():
        raise UserError(f"There are no results in {folder} (no {RESULTS_FILENAME}).")
    rows = read_csv(check_own_file(path, folder), ["metric", "value"])
    called = {row["sae"] for row in rows if row.get("sae")}
    if called and not (only_sae and len(called) == 1):
        names = set(names)
        rows = [row for row in rows if row.get("sae") in names]
        if not rows:
            raise UserError(
                f"{path} has results about {', '.join(sorted(called))}, but none about {' or '.join(sorted(names))}."
            )
    figures = [check_own_file(figure, folder) for figure in sorted(folder.glob("*.png"))]
    return Results([{column: row.get(column, "") for column in _COLUMNS} for row in rows], figures)


_COLUMNS = ("evaluation", "metric", "level", "width", "value")
"""What a card shows; other columns are not published."""
