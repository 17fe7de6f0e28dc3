"""The paper's figures: each evaluation's metric against the width of a level, and against L0 beside baselines."""

from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from sae_lens_matryoshka.bench.results import HEADLINES, headline_table
from sae_lens_matryoshka.untrusted.figure_text import text_as_it_stands

BY_WIDTH_FILENAME = "metrics_by_width.png"
BY_L0_FILENAME = "metrics_by_l0.png"
FIGURE_MARK = "sae-lens-matryoshka evaluate"
"""What a figure says that it was made with: only a figure that says so is ever replaced."""

N_COLUMNS = 3


@text_as_it_stands()
def plot_results(results: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw both figures into a folder; the one against L0 only where the core evaluation has measured it.

    Args:
        results: As :func:`load_results` gives them.
        folder: Where to write the PNG files.

    Returns:
        The files.
    """
    table = headline_table(results)
    paths = [_plot(table, "width", "latents", folder / BY_WIDTH_FILENAME)]
    if table["l0"].count() > 0:
        paths.append(_plot(table, "l0", "L0 (mean latents active a token)", folder / BY_L0_FILENAME))
    return paths


def _plot(table: pd.DataFrame, x: str, x_label: str, path: Path) -> Path:
    metrics = [column for column in table.columns if column not in ("sae", "level", "width", "l0")]
    n_columns = min(N_COLUMNS, len(metrics))
    n_rows = -(-len(metrics) // n_columns)
    figure = Figure(figsize=(4 * n_columns, 3.2 * n_rows + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(n_rows, n_columns, squeeze=False).flat
    for metric, axes in zip(metrics, panels, strict=False):
        _panel(axes, table, x, metric)
        axes.set_xlabel(x_label)
    for axes in list(panels):
        axes.set_visible(False)
    lines = figure.axes[0].get_lines()
    labels = [str(line.get_label()) for line in lines]  # matplotlib itself leaves out those that begin with _
    figure.legend(lines, labels, loc="outside lower center", ncols=len(lines))
    figure.savefig(path, dpi=150, metadata={"Software": FIGURE_MARK})
    return path


def _panel(axes: Axes, table: pd.DataFrame, x: str, metric: str) -> None:
    for name, of_sae in table.groupby("sae", sort=False):
        of_sae = of_sae.dropna(subset=[x])
        if of_sae["level"].count() > 0:
            (line,) = axes.plot(of_sae[x], of_sae[metric], marker="o", markersize=5, label=str(name))
            for point in of_sae[[x, metric, "level"]].dropna().itertuples(index=False):
                axes.annotate(
                    str(point[2]),
                    point[:2],
                    textcoords="offset points",
                    xytext=(5, 4),
                    fontsize=7,
                    color=line.get_color(),
                )
        else:
            axes.plot(of_sae[x], of_sae[metric], linestyle="", marker="*", markersize=11, label=str(name))
    headlines = [headline for several in HEADLINES.values() for headline in several]
    higher = {headline.label.split(",")[0]: headline.higher_is_better for headline in headlines}
    axes.set_title(f"{metric} ({'higher' if higher[metric.split(',')[0]] else 'lower'} is better)", fontsize=10)
    if x == "width":
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(table["width"].unique()))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="x", labelsize=8)
    axes.margins(x=0.08, y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
