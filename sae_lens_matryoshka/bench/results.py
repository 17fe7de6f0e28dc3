"""Reading SAEBench's result files back as one tidy table, and the figure that stands for each evaluation."""

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from sae_lens_matryoshka.bench.result_files import Result, read_results
from sae_lens_matryoshka.bench.side_by_side import differing
from sae_lens_matryoshka.saved.baseline_names import CHANNELS

COLUMNS = ["sae", "level", "width", "evaluation", "metric", "value", "standard_error", "l0", "weights"]

_KS = (1, 2, 5, 10, 20, 50, 100)


@dataclass(frozen=True)
class Headline:
    """The metric that stands for an evaluation in tables and figures."""

    label: str
    """The evaluation in words, with ``{n}`` for the number of latents in the metric's name."""

    metrics: tuple[str, ...]
    """Names of the metric; the first that was measured counts."""

    higher_is_better: bool = True


HEADLINES = {
    "sparse_probing": (
        Headline("sparse probing, top {n}", tuple(f"sae_top_{k}_test_accuracy" for k in _KS)),
        Headline("sparse probing, top {n} standardized", tuple(f"sae_top_{k}_standardized_test_accuracy" for k in _KS)),
    ),
    "sparse_probing_sae_probes": (Headline("sae_probes AUC, top {n}", tuple(f"sae_top_{k}_test_auc" for k in _KS)),),
    "tpp": (
        Headline("TPP, {n} latents", tuple(f"tpp_threshold_{n}_total_metric" for n in (20, 10, 5, 2, 50, 100, 500))),
    ),
    "scr": (Headline("SCR, {n} latents", tuple(f"scr_metric_threshold_{n}" for n in (20, 10, 5, 2, 50, 100, 500))),),
    "absorption": (Headline("absorption", ("mean_absorption_fraction_score",), higher_is_better=False),),
    "core": (Headline("loss recovered", ("ce_loss_score",)),),
    "meta_structure": (
        Headline("decoder explained", ("decoder_fraction_variance_explained",), higher_is_better=False),
    ),
}
"""What SAEBench's and the paper's figures show, by evaluation, and probing by standardized difference."""


def load_results(folder: str | Path, warn: Callable[[str], object] = warnings.warn) -> pd.DataFrame:
    """Every metric of every result file in a folder, a row each, whatever they were made with.

    Args:
        folder: What evaluations wrote to. The result files lie in folders named after the evaluations.
        warn: What to do with the sentences that say that a file is passed over, or that results of one evaluation were
            made with different configs, texts, models or versions, so that their numbers are not comparable.

    Returns:
        A table with the columns ``sae``, ``level`` (missing for SAEs without levels), ``width``, ``evaluation``,
        ``metric``, ``value``, its ``standard_error`` over test texts, sequences or letters (missing where not known),
        ``l0`` of the core evaluation of the same SAE and level (missing without one), and ``weights``, the data type
        and a hash of the SAE or level that was evaluated (missing where not recorded). Rows whose ``sae`` is
        ``model channels`` are of probes on the model's own channels, as if they were latents.

    Raises:
        UserError: If there are no result files, or none that can be read.
    """
    results = read_results(folder, HEADLINES, warn)
    for sentence in differing(results):
        warn(sentence)
    return results_table(results)


def results_table(results: Sequence[Result]) -> pd.DataFrame:
    """The table of :func:`load_results`, of one result or more."""
    rows = [
        {
            "sae": result.sae,
            "level": result.level,
            "width": result.width,
            "evaluation": result.evaluation,
            "metric": metric,
            "value": value,
            "standard_error": result.standard_errors.get(metric),
            "weights": result.made_from.get("sae"),
        }
        for result in results
        for metric, value in result.metrics.items()
    ]
    rows += _of_channels(results)
    table: Any = pd.DataFrame(rows).reindex(columns=COLUMNS)
    table["level"] = table["level"].astype("Int64")
    l0: Any = table[(table["evaluation"] == "core") & (table["metric"] == "l0")]
    by_sae = dict(zip(zip(l0["sae"], l0["width"], strict=True), l0["value"], strict=True))
    table["l0"] = [by_sae.get(pair, float("nan")) for pair in zip(table["sae"], table["width"], strict=True)]
    return table.sort_values(["evaluation", "sae", "width", "metric"], ignore_index=True)


def headline_table(results: pd.DataFrame, column: str = "value") -> pd.DataFrame:
    """One row an SAE and level, one column a metric that stands for an evaluation, and L0.

    Args:
        results: As :func:`load_results` gives them.
        column: What of the metrics, ``value`` or ``standard_error``.

    Returns:
        A table with the columns ``sae``, ``level``, ``width``, ``l0`` and a column a metric, named in words.
    """
    keys = ["sae", "level", "width", "l0"]
    table: Any = results[keys]
    table = table.drop_duplicates(["sae", "width"]).sort_values(["sae", "width"], ignore_index=True)
    headlines = [(evaluation, headline) for evaluation, several in HEADLINES.items() for headline in several]
    for evaluation, headline in headlines:
        of_evaluation: Any = results[results["evaluation"] == evaluation]
        measured = set(of_evaluation.dropna(subset="value")["metric"])
        metric = next((metric for metric in headline.metrics if metric in measured), None)
        if metric is None:
            continue
        values = of_evaluation[of_evaluation["metric"] == metric].set_index(["sae", "width"])[column]
        number = re.search(r"\d+", metric)
        label = headline.label.format(n=number and number[0])
        table[label] = [values.get(pair, float("nan")) for pair in zip(table["sae"], table["width"], strict=True)]
    return table


def _of_channels(results: Sequence[Result]) -> list[dict[str, Any]]:
    """What evaluations found in passing with the model's channels in place of latents, once for each hook."""
    rows: dict[tuple[str, Any], list[dict[str, Any]]] = {}
    probed = [result for result in results if result.evaluation in ("sparse_probing", "sparse_probing_sae_probes")]
    hooks = {result.made_from.get("hook") for result in probed}
    for result in probed:
        hook = result.made_from.get("hook")
        rows[result.evaluation, hook] = [
            {
                "sae": CHANNELS if len(hooks) == 1 else f"{CHANNELS} of {hook}",
                "width": result.d_in,
                "evaluation": result.evaluation,
                "metric": metric.replace("llm_", "sae_", 1),
                "value": value,
                "standard_error": result.standard_errors.get(metric),
            }
            for metric, value in result.metrics.items()
            if metric.startswith("llm_") and result.d_in is not None
        ]
    return [row for of_hook in rows.values() for row in of_hook]
