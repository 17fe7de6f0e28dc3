"""SAEs of a real Gemma 3 270M, layer 9, side by side: the tables of docs/gemma-3-270m.md, from one activation cache.

    M="--model FOLDER --text train.jsonl --work DIR"
    python benchmarks/gemma_3_270m.py $M train             # caches, then trains what is not there yet, in order of need
    python benchmarks/gemma_3_270m.py $M evaluate --probing DIR
    python benchmarks/gemma_3_270m.py $M tables            # of what there is by then

Each step goes on where it was stopped. FOLDER holds the model, DIR the labelled texts as JSON Lines.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from train_step import machine

from sae_lens_matryoshka import train
from sae_lens_matryoshka.run_files.reading import read_run_file
from sae_lens_matryoshka.saved.level_figures import LevelMetrics, read_level_figures
from sae_lens_matryoshka.training.caching import cache_activations

PAGE = Path(__file__).parents[1] / "docs" / "gemma-3-270m.md"
RUN = "gemma-3-270m"
MEAN_NORM = "sae.normalize_activations=expected_average_only_in"
WIDE = ["sae.d_sae=16384", "sae.matryoshka_widths=[512, 1536, 3584, 7680, 16384]"]


def without_levels(d_sae: int = 4096) -> str:
    """A Matryoshka SAE with one level is a BatchTopK SAE (tests/saes/test_variants.py)."""
    return f"sae.matryoshka_widths=[{d_sae}]"


STUDY: dict[str, list[str]] = {
    "Matryoshka": [],
    "BatchTopK": [without_levels()],
    "Matryoshka, by mean norm": [MEAN_NORM],
    "BatchTopK, by mean norm": [without_levels(), MEAN_NORM],
    "Matryoshka, k 16": ["sae.k=16"],
    "BatchTopK, k 16": ["sae.k=16", without_levels()],
    "Matryoshka, k 64": ["sae.k=64"],
    "BatchTopK, k 64": ["sae.k=64", without_levels()],
    "Matryoshka, seed 1": ["seed=1"],
    "BatchTopK, seed 1": ["seed=1", without_levels()],
    "Matryoshka, seed 2": ["seed=2"],
    "BatchTopK, seed 2": ["seed=2", without_levels()],
    "Matryoshka, 16,384": WIDE,
    "BatchTopK, 16,384": ["sae.d_sae=16384", without_levels(16384)],
}
"""Settings of each SAE beside those of the run file (4,096 latents, k 32, channels standardized, seed 42), most wanted
first."""

MAIN = ("Matryoshka", "BatchTopK")
BY_MEAN_NORM = tuple(f"{kind}, by mean norm" for kind in MAIN)
SEEDS = tuple(f"{kind}, seed {seed}" for seed in (1, 2) for kind in MAIN)

CORE = ("--set", "core.n_eval_reconstruction_batches=4", "--set", "core.n_eval_sparsity_variance_batches=4")
"""A batch of core is 16 contexts of 128 tokens."""

SAE_PROBES = (
    "sparse_probing_sae_probes.dataset_names=[5_hist_fig_ismale, 22_headline_isobama, 36_sciq_tf, 42_temp_sense, "
    "56_wikidatasex_or_gender, 60_wikidata_occupation_isathlete, 92_glue_sst2, 96_spam_is, 105_click_bait, "
    "106_hate_hate, 114_nyc_borough_Manhattan, 117_us_state_FL, 124_world_country_United_States, 128_art_type_movie, "
    "155_athlete_sport_basketball, 161_agnews_0]"
)
"""One task of each family of short texts."""

ABSORPTION = ("--set", "absorption.min_feats_for_eval=5")


def main() -> None:
    """Do one step of the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="cache, SAEs and results go there")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="activations to cache")
    parser.add_argument("--training-tokens", type=int, default=2_000_000)
    parser.add_argument(
        "--dtype", default="bfloat16", help="of the language model; float32 on a CPU without AVX-512 BF16"
    )
    parser.add_argument("--probing", type=Path, help="folder of labelled text")
    parser.add_argument("--limit-texts", type=int, default=100, help="of each class, to train and to test on")
    parser.add_argument("--words", type=int, default=2600, help="of the vocabulary, for absorption")
    parser.add_argument("step", choices=["train", "evaluate", "tables"])
    options = parser.parse_args()
    {"train": train_all, "evaluate": evaluate_all, "tables": write_tables}[options.step](options)


def _run_file(options: argparse.Namespace, settings: Sequence[str]) -> dict[str, Any]:
    here = [f"model_name={options.model}", f"dataset_path={options.text}", "streaming=false", "device=cpu"]
    here.append(f"model_from_pretrained_kwargs.dtype={options.dtype}")
    return read_run_file(RUN, [*here, f"training_tokens={options.training_tokens}", *settings])


def train_all(options: argparse.Namespace) -> None:
    """Cache the activations, train every SAE from them, and say how long each took."""
    cache = options.work / "cache"
    cache_activations(_run_file(options, []), cache, tokens=options.tokens)
    for name, settings in STUDY.items():
        begun = time.monotonic()
        result = train(_run_file(options, settings), output=_folder(options, name), resume="auto", activations=cache)
        print(f"{name}: {time.monotonic() - begun:.0f} s{' (was there)' if result.was_finished else ''}", flush=True)


def evaluate_all(options: argparse.Namespace) -> None:
    """Evaluate as on the command line, each evaluation on the SAEs and levels that it is worth it for."""
    trained = _trained(options)
    data = [f"--data={path.stem}={path}" for path in sorted(options.probing.glob("*.jsonl"))]
    main = [name for name in (*MAIN, *BY_MEAN_NORM) if name in trained]
    others = [name for name in trained if name not in main]
    seeds = [name for name in trained if name in (*MAIN, *SEEDS)]
    probing = ["--evals=sparse_probing", f"--limit-texts={options.limit_texts}", *data]
    core = ["--evals=core", "--no-baselines", f"--text={options.text}", *CORE]
    sae_probes = ["--evals=sparse_probing_sae_probes", "--limit-texts=200", "--set", SAE_PROBES]
    absorption = ["--evals=absorption", f"--absorption-max-words={options.words}", *ABSORPTION]
    for names, arguments in (
        (main, probing),
        (others, [*probing, "--no-baselines"]),
        (main, core),
        ([name for name in others if name not in seeds], [*core, "--levels=-1"]),
        ([name for name in seeds if name in main], sae_probes),
        ([name for name in trained if name not in main], [*sae_probes, "--no-baselines"]),
        (seeds, absorption),
    ):
        if names:
            begun = time.monotonic()
            _evaluate(options, names, arguments)
            print(f"{arguments[0]} of {len(names)} SAEs: {time.monotonic() - begun:.0f} s", flush=True)


def _evaluate(options: argparse.Namespace, names: Sequence[str], arguments: Sequence[str]) -> None:
    saes = [f"{name.replace(', ', ' ').replace(' ', '_')}={_folder(options, name)}" for name in names]
    command = [sys.executable, "-m", "sae_lens_matryoshka", "evaluate", *saes, "--model", str(options.model)]
    command += ["--dtype", options.dtype, "--output", str(options.work / "evaluations")]
    subprocess.run([*command, "--cache", str(options.work / "probing-cache"), *arguments], check=True)


def write_tables(options: argparse.Namespace) -> None:
    """Put what has been measured between the page's markers."""
    figures = {name: read_level_figures(_folder(options, name)) for name in _trained(options)}
    parts = [
        f"Made by `python benchmarks/gemma_3_270m.py`; {machine('cpu')}.",
        _level_tables(figures),
        *_seeds_table(figures),
        *_evaluation_tables(options.work / "evaluations"),
    ]
    begin, end = "<!-- results: begin -->", "<!-- results: end -->"
    before, rest = PAGE.read_text(encoding="utf-8").split(begin)
    after = rest.split(end)[1]
    PAGE.write_text(f"{before}{begin}\n\n" + "\n\n".join(parts) + f"\n\n{end}{after}", encoding="utf-8")


def _folder(options: argparse.Namespace, name: str) -> Path:
    return options.work / "saes" / name.replace(", ", "-").replace(" ", "_").replace(",", "")


def _trained(options: argparse.Namespace) -> list[str]:
    return [name for name in STUDY if read_level_figures(_folder(options, name))]


def _level_tables(figures: dict[str, list[LevelMetrics]]) -> str:
    rows = [
        [
            name if level.level == 0 else "", f"{level.width:,}", f"{level.l0:.1f}", f"{level.fvu:.3f}",
            f"{level.fvu_standardized:.3f}", f"{level.dead:,} ({level.dead / level.width:.0%})", f"{level.dense:,}",
            f"{level.above_half:,}",
        ]
        for name, levels in figures.items()
        for level in levels
    ]  # fmt: skip
    return "### Every level\n\n" + _markdown(
        ["SAE", "width", "L0", "FVU", "FVU, channels alike", "dead", "dense", "above half"], rows
    )


def _seeds_table(figures: dict[str, list[LevelMetrics]]) -> list[str]:
    rows: list[list[str]] = []
    for kind in ("Matryoshka", "BatchTopK"):
        runs = [figures[name] for name in (kind, f"{kind}, seed 1", f"{kind}, seed 2") if name in figures]
        for levels in zip(*runs, strict=True) if len(runs) > 1 else ():
            cells = [
                _spread([getattr(level, field) for level in levels], digits)
                for field, digits in (("fvu", 3), ("fvu_standardized", 3), ("dead", 0), ("dense", 0))
            ]
            rows.append([kind, f"{levels[0].width:,}", str(len(runs)), *cells])
    header = ["SAE", "width", "seeds", "FVU", "FVU, channels alike", "dead", "dense"]
    return ["### How much seeds differ\n\n" + _markdown(header, rows)] if rows else []


def _evaluation_tables(evaluations: Path) -> list[str]:
    if not (evaluations / "results.csv").is_file():
        return []
    results: Any = pd.read_csv(evaluations / "results.csv")
    return [
        f"### {title}\n\n" + _markdown(["SAE", "width", *labels.values()], _metric_rows(results, evaluation, labels))
        for evaluation, title, labels in (
            ("sparse_probing", "Probing with a few latents", {
                "sae_top_1_test_accuracy": "top 1", "sae_top_5_test_accuracy": "top 5",
                "sae_top_1_standardized_test_accuracy": "top 1, standardized",
                "sae_top_5_standardized_test_accuracy": "top 5, standardized",
            }),
            ("core", "Loss recovered", {"ce_loss_score": "loss recovered"}),
        )
        if evaluation in set(results["evaluation"])
    ]  # fmt: skip


def _metric_rows(results: Any, evaluation: str, labels: dict[str, str]) -> list[list[str]]:
    of_evaluation = results[results["evaluation"] == evaluation]
    rows: list[list[str]] = []
    for (sae, width), group in of_evaluation.groupby(["sae", "width"], sort=False):
        by_metric = group.set_index("metric")
        cells = [
            f"{by_metric.loc[metric, 'value']:.3f} ±{by_metric.loc[metric, 'standard_error']:.3f}"
            if metric in by_metric.index
            else "-"
            for metric in labels
        ]
        rows.append([str(sae).replace("_", " "), f"{int(width):,}", *cells])
    return rows


def _spread(values: Sequence[float], digits: int) -> str:
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ±{statistics.stdev(values):.{digits}f}"


def _markdown(header: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
