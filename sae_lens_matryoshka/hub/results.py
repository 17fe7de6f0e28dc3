"""Benchmark results for a model card: the rows of ``results.csv`` that belong to an SAE, and the figures beside it."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_lens import SAE

from sae_lens_matryoshka.errors import UserError
from sae_lens_matryoshka.hub.own_files import check_own_file
from sae_lens_matryoshka.saes.loading import load_any
from sae_lens_matryoshka.saes.matryoshka_sae import MatryoshkaSAE
from sae_lens_matryoshka.saved.baseline_names import without_baselines
from sae_lens_matryoshka.saved.fingerprints import typed_hash
from sae_lens_matryoshka.untrusted.bounded import is_whole_number
from sae_lens_matryoshka.untrusted.csv_tables import read_csv

RESULTS_FILENAME = "results.csv"


@dataclass(frozen=True)
class Results:
    """What benchmarks have found about one SAE."""

    rows: list[dict[str, str]]
    """Rows with ``metric`` and ``value``, and where recorded ``evaluation``, ``level``, ``width``, else empty."""

    figures: list[Path]
    """PNG files, by name."""

    measured_on: list[tuple[str, str, str]]
    """Level, width and weights of the rows that record their weights, each once."""


def read_results(folder: str | Path, names: Iterable[str], only_sae: bool) -> Results:
    """Read the results of one SAE from a folder of results.

    Args:
        folder: The folder with ``results.csv`` and figures.
        names: What the SAE may be called in the table's ``sae`` column: its id, its folder.
        only_sae: Whether it is the only SAE to be published; a table about one SAE and its baselines is then its
            table, whatever that is called there.

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
    if called:
        trained = without_baselines(called)
        names = {*trained, ""} if only_sae and len(trained) == 1 else set(names)
        rows = [row for row in rows if row.get("sae", "") in names]
        if not rows:
            raise UserError(
                f"{path} has results about {', '.join(sorted(called))}, but none about {' or '.join(sorted(names))}."
            )
    figures = [check_own_file(figure, folder) for figure in sorted(folder.glob("*.png"))]
    shown = [{column: row.get(column, "") for column in _COLUMNS} for row in rows]
    measured_on = {(row.get("level", ""), row.get("width", ""), row["weights"]) for row in rows if row.get("weights")}
    return Results(shown, figures, sorted(measured_on))


def check_measured_on(results: Results, folder: Path) -> None:
    """Refuse results that were measured on other weights or settings than those of the SAE that is published.

    Results that do not record their weights, such as a table of one's own, cannot be compared.

    Raises:
        UserError: If there are such results.
    """
    loaded: dict[str, SAE[Any]] = {}
    for level, width, weights in results.measured_on:
        dtype = weights.partition(":")[0]
        if dtype in ("float32", "bfloat16", "float16", "float64") and dtype not in loaded:
            loaded[dtype] = load_any(folder, dtype=dtype)
        if dtype not in loaded or _hash_of_level(loaded[dtype], level, width) != weights:
            raise UserError(
                f"The results about {f'level {level} of ' if level else ''}{folder} were measured on other weights or "
                f"settings than it has now (column weights of {RESULTS_FILENAME}); evaluate it again with --force, or "
                f"publish it without results."
            )


def _hash_of_level(sae: SAE[Any], level: str, width: str) -> str | None:
    if not level:
        return typed_hash(sae)
    if not (is_whole_number(level) and is_whole_number(width)):
        return None
    if not isinstance(sae, MatryoshkaSAE):  # the widths were given by hand
        if not 0 < int(width) <= sae.cfg.d_sae:
            return None
        sae = MatryoshkaSAE.from_sae(sae, sorted({int(width), sae.cfg.d_sae}))
        return typed_hash(sae.at_level(0))
    is_there = int(level) < sae.n_levels and sae.widths[int(level)] == int(width)
    return typed_hash(sae.at_level(int(level))) if is_there else None


_COLUMNS = ("evaluation", "metric", "level", "width", "value")
"""What a card shows; other columns are not published."""
