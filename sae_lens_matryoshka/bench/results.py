"""Reading SAEBench's result files back as one tidy table, and the figure that stands for each evaluation."""

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from sae_lens_matryoshka.errors import UserError
from sae_lens_matryoshka.untrusted.bounded import load_json

COLUMNS = ["sae", "level", "width", "evaluation", "metric", "value", "l0"]


@dataclass(frozen=True)
class Headline:
    """The metric that stands for an evaluation in tables and figures."""

    label: str
    metrics: tuple[str, ...]
    """Names of the metric; the first that was measured counts."""

    higher_is_better: bool = True


HEADLINES = {
    "sparse_probing": Headline(
        "sparse probing, top 1", tuple(f"sae_top_{k}_test_accuracy" for k in (1, 2, 5, 10, 20, 50, 100))
    ),
    "tpp": Headline("TPP, {n} latents", tuple(f"tpp_threshold_{n}_total_metric" for n in (20, 10, 5, 2, 50, 100, 500))),
    "scr": Headline("SCR, {n} latents", tuple(f"scr_metric_threshold_{n}" for n in (20, 10, 5, 2, 50, 100, 500))),
    "absorption": Headline("absorption", ("mean_absorption_fraction_score",), higher_is_better=False),
    "core": Headline("loss recovered", ("ce_loss_score",)),
    "meta_structure": Headline("decoder explained", ("decoder_fraction_variance_explained",), higher_is_better=False),
}
"""What SAEBench's and the paper's figures show, by evaluation."""


def load_results(folder: str | Path, on_unreadable: Callable[[str], object] = warnings.warn) -> pd.DataFrame:
    """Every metric of every result file in a folder, a row each.

    Args:
        folder: What evaluations wrote to. The result files lie in folders named after the evaluations.
        on_unreadable: What to do with the sentence that says that a file is passed over.

    Returns:
        A table with the columns ``sae``, ``level`` (missing for SAEs without levels), ``width``, ``evaluation``,
        ``metric``, ``value``, and ``l0`` of the core evaluation of the same SAE and level (missing without one).

    Raises:
        UserError: If there are no result files, or none that can be read.
    """
    paths = [path for name in HEADLINES for path in sorted(Path(folder, name).glob("*_eval_results.json"))]
    paths = [path for path in paths if not path.name.startswith(".")]
    if not paths:
        raise UserError(f"There are no results in {folder}; expected files as sparse_probing/NAME_eval_results.json.")
    rows: list[dict[str, Any]] = []
    for path in paths:
        try:
            rows += _rows(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            on_unreadable(f"{path} is passed over: it is not a whole result of SAEBench ({error!r}).")
    if not rows:
        raise UserError(f"There are no readable results in {folder}.")
    results: Any = pd.DataFrame(rows).reindex(columns=COLUMNS[:-1])
    results["level"] = results["level"].astype("Int64")
    l0: Any = results[(results["evaluation"] == "core") & (results["metric"] == "l0")]
    by_sae = dict(zip(zip(l0["sae"], l0["width"], strict=True), l0["value"], strict=True))
    results["l0"] = [by_sae.get(pair, float("nan")) for pair in zip(results["sae"], results["width"], strict=True)]
    return results.sort_values(["evaluation", "sae", "width", "metric"], ignore_index=True)


def headline_table(results: pd.DataFrame) -> pd.DataFrame:
    """One row an SAE and level, one column an evaluation: the metric that stands for it, and L0.

    Args:
        results: As :func:`load_results` gives them.

    Returns:
        A table with the columns ``sae``, ``level``, ``width``, ``l0`` and a column an evaluation, named in words.
    """
    keys = ["sae", "level", "width", "l0"]
    table: Any = results[keys]
    table = table.drop_duplicates(["sae", "width"]).sort_values(["sae", "width"], ignore_index=True)
    for evaluation, headline in HEADLINES.items():
        of_evaluation: Any = results[results["evaluation"] == evaluation]
        measured = set(of_evaluation.dropna(subset="value")["metric"])
        metric = next((metric for metric in headline.metrics if metric in measured), None)
        if metric is None:
            continue
        values = of_evaluation[of_evaluation["metric"] == metric].set_index(["sae", "width"])["value"]
        label = column_label(evaluation, metric)
        table[label] = [values.get(pair, float("nan")) for pair in zip(table["sae"], table["width"], strict=True)]
    return table


def column_label(evaluation: str, metric: str) -> str:
    """The evaluation in words, with the number of latents in its metric."""
    number = re.search(r"\d+", metric)
    label = HEADLINES[evaluation].label
    if number is None:
        return label
    return label.format(n=number[0]).replace("top 1", f"top {number[0]}")


def _rows(path: Path) -> list[dict[str, Any]]:
    result = load_json(path.read_text(encoding="utf-8"))
    level = re.fullmatch(r"level_([0-9]{1,9})", result["sae_lens_id"])
    name, width = result["sae_lens_release_id"], result["sae_cfg_dict"]["d_sae"]
    common = {
        "sae": name,
        "level": None if level is None else int(level[1]),
        "width": width,
        "evaluation": path.parent.name,
    }
    metrics = {
        metric: value for category in result["eval_result_metrics"].values() for metric, value in category.items()
    }
    # the core evaluation's figure beyond SAEBench's own
    unstructured = result.get("eval_result_unstructured") or {}
    metrics |= {name: value for name, value in unstructured.items() if isinstance(value, float)}
    wrong = [value for value in metrics.values() if value is not None and not isinstance(value, int | float)]
    if not isinstance(name, str) or not isinstance(width, int) or wrong:
        raise TypeError("values of other types than SAEBench's")
    return [{**common, "metric": metric, "value": value} for metric, value in metrics.items() if value is not None]
