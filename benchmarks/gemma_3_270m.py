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
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from train_step import machine

from sae_lens_matryoshka import train
from sae_lens_matryoshka.bench import load_results
from sae_lens_matryoshka.run_files.reading import read_run_file
from sae_lens_matryoshka.saved.level_figures import LevelMetrics, read_level_figures
from sae_lens_matryoshka.training.caching import cache_activations

PAGE = Path(__file__).parents[1] / "docs" / "gemma-3-270m.md"
PARETO = "gemma_3_270m_by_l0.png"
RUN = "gemma-3-270m"
MEAN_NORM = "sae.normalize_activations=expected_average_only_in"
ALIGNED = ["sae.aligned_encoder=true"]
LEVERS = [
    "sae.stop_gradient_between_levels=inner",
    "sae.order_latents_by=firing_frequency",
    "sae.k_start=77",
    "sae.k_anneal_steps=680",
    "sae.loss_tilt=0.002",
]
"""The levers of a study on SynthSAEBench beside those that the run file has; k falls until the learning rate does."""

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
    "Matryoshka, aligned": ALIGNED,
    "Matryoshka, levers": LEVERS,
    "Matryoshka, aligned and levers": [*ALIGNED, *LEVERS],
    "BatchTopK, aligned": [*ALIGNED, without_levels()],
    "Matryoshka, 16,384": WIDE,
    "BatchTopK, 16,384": ["sae.d_sae=16384", without_levels(16384)],
}
"""Settings of each SAE beside those of the run file (4,096 latents, k 32, channels standardized, seed 42), most wanted
first."""

MAIN = ("Matryoshka", "BatchTopK")
BY_MEAN_NORM = tuple(f"{kind}, by mean norm" for kind in MAIN)
WITH_LEVERS = (
    *(f"Matryoshka, {levers}" for levers in ("aligned", "levers", "aligned and levers")),
    "BatchTopK, aligned",
)
SEEDS = tuple(f"{kind}, seed {seed}" for seed in (1, 2) for kind in MAIN)

CORE = ("--set", "core.n_eval_reconstruction_batches=2", "--set", "core.n_eval_sparsity_variance_batches=2")
"""A batch of core is 16 contexts of 128 tokens."""

SAE_PROBES = (
    "sparse_probing_sae_probes.dataset_names=[5_hist_fig_ismale, 22_headline_isobama, 36_sciq_tf, 42_temp_sense, "
    "56_wikidatasex_or_gender, 60_wikidata_occupation_isathlete, 92_glue_sst2, 96_spam_is, 105_click_bait, "
    "106_hate_hate, 114_nyc_borough_Manhattan, 117_us_state_FL, 124_world_country_United_States, 128_art_type_movie, "
    "155_athlete_sport_basketball, 161_agnews_0]"
)
"""One task of each family of short texts."""

ABSORPTION = ("--set", "absorption.min_feats_for_eval=5")


METRICS = {
    "sparse_probing": (
        "Probing with a few latents",
        {
            "sae_top_1_test_accuracy": "top 1",
            "sae_top_5_test_accuracy": "top 5",
            "sae_top_1_standardized_test_accuracy": "top 1, standardized",
            "sae_top_5_standardized_test_accuracy": "top 5, standardized",
        },
    ),
    "core": ("Loss recovered", {"ce_loss_score": "loss recovered"}),
    "sparse_probing_sae_probes": (
        "sae_probes, area under the curve",
        {"sae_top_1_test_auc": "top 1", "sae_top_5_test_auc": "top 5"},
    ),
    "absorption": (
        "Absorption, lower is better",
        {"mean_absorption_fraction_score": "absorption fraction", "mean_full_absorption_score": "full absorption"},
    ),
}
"""Title and columns of each evaluation's table."""


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
    """Evaluate as on the command line, each evaluation on the SAEs and levels that it is worth it for, main ones first.

    Raises:
        SystemExit: At the end, if an evaluation has failed.
    """
    trained = _trained(options)
    data = [f"--data={path.stem}={path}" for path in sorted(options.probing.glob("*.jsonl"))]
    pair = [name for name in MAIN if name in trained]
    main = [name for name in (*MAIN, *BY_MEAN_NORM) if name in trained]
    others = [name for name in trained if name not in main]
    levers = [name for name in trained if name in WITH_LEVERS]
    seeds = [name for name in trained if name in (*MAIN, *SEEDS)]
    rest = [name for name in trained if name not in (*pair, *levers)]
    probing = ["--evals=sparse_probing", f"--limit-texts={options.limit_texts}", *data]
    core = ["--evals=core", "--no-baselines", f"--text={options.text}", *CORE]
    sae_probes = ["--evals=sparse_probing_sae_probes", "--limit-texts=200", "--set", SAE_PROBES]
    absorption = ["--evals=absorption", f"--absorption-max-words={options.words}", *ABSORPTION]
    failed = False
    for names, arguments in (
        (main, probing),
        (others, [*probing, "--no-baselines"]),
        ([*pair, *levers], core),
        (rest, [*core, "--levels=-1"]),
        (pair, absorption),
        ([name for name in (*seeds, *levers) if name not in pair], [*absorption, "--no-baselines"]),
        (pair, sae_probes),
        (levers, [*sae_probes, "--no-baselines"]),
    ):
        if names:
            begun = time.monotonic()
            done = _evaluate(options, names, arguments)
            failed |= not done
            took = f"{time.monotonic() - begun:.0f} s"
            print(f"{arguments[0]} of {len(names)} SAEs: {took if done else 'failed after ' + took}", flush=True)
    if failed:
        raise SystemExit(1)


def _evaluate(options: argparse.Namespace, names: Sequence[str], arguments: Sequence[str]) -> bool:
    saes = [f"{_label(name)}={_folder(options, name)}" for name in names]
    command = [sys.executable, "-m", "sae_lens_matryoshka", "evaluate", *saes, "--model", str(options.model)]
    command += ["--dtype", options.dtype, "--output", str(options.work / "evaluations")]
    done = subprocess.run([*command, "--cache", str(options.work / "probing-cache"), *arguments], check=False)
    return done.returncode == 0


def write_tables(options: argparse.Namespace) -> None:
    """Put what has been measured between the page's markers."""
    figures = {name: read_level_figures(_folder(options, name)) for name in _trained(options)}
    parts = [
        f"Made by `python benchmarks/gemma_3_270m.py`; {machine('cpu')}.",
        _level_tables(figures),
        *_seeds_table(figures),
        *_evaluation_tables(options.work / "evaluations"),
    ]
    plot_pareto(figures, options.work / "evaluations")
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
    if not evaluations.is_dir():
        return []
    results: Any = load_results(evaluations)
    return [
        f"### {title}\n\n" + _markdown(["SAE", "width", *labels.values()], _metric_rows(results, evaluation, labels))
        for evaluation, (title, labels) in METRICS.items()
        if evaluation in set(results["evaluation"])
    ]


def _metric_rows(results: Any, evaluation: str, labels: dict[str, str]) -> list[list[str]]:
    of_evaluation = results[results["evaluation"] == evaluation]
    order = {_label(name): place for place, name in enumerate(STUDY)}
    rows: list[tuple[tuple[int, str, int], list[str]]] = []
    for (sae, width), group in of_evaluation.groupby(["sae", "width"], sort=False):
        by_metric = group.set_index("metric")
        if not set(labels) & set(by_metric.index):
            continue
        cells = [_with_error(by_metric.loc[m]) if m in by_metric.index else "-" for m in labels]
        place = order.get(str(sae).removesuffix(" random"), len(order))
        rows.append(((place, str(sae), int(width)), [_name(sae), f"{int(width):,}", *cells]))
    return [row for _, row in sorted(rows, key=lambda row: row[0])]


def _with_error(metric: Any) -> str:
    error = metric["standard_error"]
    return f"{metric['value']:.3f}" + (f" ±{error:.3f}" if error == error else "")


def plot_pareto(figures: dict[str, list[LevelMetrics]], evaluations: Path) -> None:
    """Full levels against L0: variance unexplained, probing and loss recovered, where k is all that differs."""
    results: Any = load_results(evaluations) if evaluations.is_dir() else None
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels: list[tuple[str, Callable[[str], float]]] = [
        ("FVU, channels alike (lower is better)", lambda name: figures[name][-1].fvu_standardized or float("nan")),
        ("probing, top 1 standardized", lambda name: _full(results, name, "sae_top_1_standardized_test_accuracy")),
        ("loss recovered", lambda name: _full(results, name, "ce_loss_score")),
    ]
    for axes, (title, value) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for kind in MAIN:
            names = [name for name in (f"{kind}, k 16", kind, f"{kind}, k 64") if name in figures]
            axes.plot([figures[n][-1].l0 for n in names], [value(n) for n in names], marker="o", label=kind)
        for name in ("Matryoshka, levers", *BY_MEAN_NORM):
            if name in figures:
                axes.plot(figures[name][-1].l0, value(name), marker="*", linestyle="", label=name)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("L0")
    lines = figure.axes[0].get_lines()
    labels = [str(line.get_label()) for line in lines]
    figure.legend(lines, labels, loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(PAGE.parent / PARETO, dpi=150)


def _full(results: Any, name: str, metric: str) -> float:
    """A metric of an SAE's full level; nan where it has not been measured."""
    if results is None:
        return float("nan")
    width = 16384 if "16,384" in name else 4096
    of_metric = results[(results["sae"] == _label(name)) & (results["metric"] == metric) & (results["width"] == width)]
    return float(of_metric["value"].iloc[0]) if len(of_metric) else float("nan")


def _label(name: str) -> str:
    """What an SAE is called in results."""
    return name.replace(", ", " ").replace(" ", "_")


def _name(label: Any) -> str:
    return str(label).replace("_", " ")


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
