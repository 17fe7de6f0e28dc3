"""The figures of an SAE's levels, and the file beside a saved SAE that holds them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

from rich.table import Table
from safetensors import SafetensorError

from sae_lens_matryoshka.errors import UserError
from sae_lens_matryoshka.untrusted.csv_tables import read_csv, write_csv

LEVELS_FILENAME = "levels.csv"
"""The table of figures in the folder of a saved SAE."""

WEIGHTS_COLUMN = "weights"
"""The column that names what was measured by its contents."""

DENSE_SHARE = 0.1
"""A latent that fires on a larger share of all samples is counted as dense."""

FIGURE_HEADINGS = ("L0", "FVU", "FVU, channels alike", "dead", "dense", "above half")
"""What :func:`figure_cells` gives, as the columns of a table are called."""


@dataclass(frozen=True)
class LevelMetrics:
    """Figures of one level."""

    level: int
    """Index of the level, 0 the smallest."""

    width: int
    """Number of latents of the level."""

    l0: float
    """Mean number of latents of the level that fire a sample."""

    fvu: float
    """Fraction of the activations' variance that the level leaves unexplained: 1 - explained variance."""

    fvu_standardized: float | None = field(default=None, kw_only=True)
    """The same with every channel divided by its standard deviation: the fraction of a channel's variance that is left
    unexplained, averaged over the channels that vary, so that none counts more than another. None: not measured."""

    dead: int
    """Number of latents of the level that never fired."""

    dense: int
    """Number of latents of the level that fired on more than a tenth of the samples."""

    above_half: int | None = field(default=None, kw_only=True)
    """Number of latents of the level that fired on more than half of the samples. None: not counted."""

    n_samples: int
    """Number of samples that it was measured on."""


def write_level_figures(folder: Path, levels: Sequence[LevelMetrics]) -> None:
    """Write the figures beside a saved SAE, with a name for what they were measured on in a column ``weights``."""
    from sae_lens_matryoshka.saved.fingerprints import saved_sae_hash  # which imports torch

    weights = saved_sae_hash(folder)
    write_csv(folder / LEVELS_FILENAME, [{**asdict(level), WEIGHTS_COLUMN: weights} for level in levels])


def read_level_figures(folder: Path) -> list[LevelMetrics]:
    """The figures beside a saved SAE, as they were measured.

    Empty if they were not, or were on other weights or settings, or if the file was cut off or holds something else:
    they can be measured again.
    """
    types = get_type_hints(LevelMetrics)
    if not (folder / LEVELS_FILENAME).is_file():
        return []
    try:
        rows = read_csv(folder / LEVELS_FILENAME)
        if not are_of_saved_sae(rows, folder):
            return []
        return [LevelMetrics(**{name: _value(row, name, types[name]) for name in types}) for row in rows]
    except (UserError, OSError, SafetensorError, KeyError, ValueError, TypeError):
        return []


def are_of_saved_sae(rows: Sequence[Mapping[str, str]], folder: Path) -> bool:
    """Whether rows of a table of levels say that they were measured on the SAE that a folder holds now."""
    from sae_lens_matryoshka.saved.fingerprints import saved_sae_hash  # which imports torch

    weights = {row.get(WEIGHTS_COLUMN) or None for row in rows}
    return weights == {saved_sae_hash(folder)}


def levels_table(levels: Sequence[LevelMetrics], title: str) -> Table:
    """The figures as a table for people."""
    table = Table("level", "width", *FIGURE_HEADINGS, title=title)
    for level in levels:
        table.add_row(str(level.level), str(level.width), *figure_cells(level))
    return table


def figure_cells(level: LevelMetrics) -> tuple[str, ...]:
    """A level's figures as they are shown, one for each of :data:`FIGURE_HEADINGS`."""
    fvu_standardized = "-" if level.fvu_standardized is None else f"{level.fvu_standardized:.4f}"
    counts = ("-" if n is None else f"{n} ({n / level.width:.1%})" for n in (level.dead, level.dense, level.above_half))
    return (f"{level.l0:.2f}", f"{level.fvu:.4f}", fvu_standardized, *counts)


def _value(row: Mapping[str, str], name: str, kind: Any) -> Any:
    """A cell of the table; older tables lack what may be None."""
    of_optional = [k for k in get_args(kind) if k is not type(None)]
    if not of_optional:
        return kind(row[name])
    return of_optional[0](row[name]) if row.get(name) else None
