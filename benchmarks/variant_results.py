"""How well every variant does: the tables of docs/variants.md, made by training all of them.

On the synthetic model with known features (three seeds, mean and spread), and on a TinyStories model in one run that
all variants share.

    python benchmarks/variant_results.py --tinystories ../shared/tinystories
"""

import argparse
import re
import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from train_step import machine

from sae_lens_matryoshka.run_files.reading import read_run_file
from sae_lens_matryoshka.training.run import TrainedSAE, train

PAGE = Path(__file__).parents[1] / "docs" / "variants.md"
MARKERS = "<!-- results: begin -->", "<!-- results: end -->"

DRAWN: dict[str, Any] = {"prefix_sampling": {"n_prefixes": 5}, "order_latents_by": "contribution"}
QUADRATIC: dict[str, Any] = {"jumprelu_sparsity_loss_mode": "quadratic", "l0_coefficient": 0.3}
VARIANTS: dict[str, dict[str, Any]] = {
    "SAELens batchtopk (no levels)": {"architecture": "batchtopk"},
    "matryoshka": {"architecture": "matryoshka"},
    "matryoshka, k a quarter larger": {"architecture": "matryoshka", "k": 1.25},  # times that of the others
    "matryoshka, snap loss": {"architecture": "matryoshka", "snap_loss": True},
    "matryoshka, stopped gradients": {"architecture": "matryoshka", "stop_gradient_between_levels": True},
    "matryoshka, drawn prefixes, ordered": {"architecture": "matryoshka", **DRAWN},
    "matryoshka_topk": {"architecture": "matryoshka_topk"},
    "SAELens jumprelu (no levels)": {"architecture": "jumprelu", **QUADRATIC},
    "matryoshka_jumprelu": {"architecture": "matryoshka_jumprelu", **QUADRATIC},
    "SAELens standard (no levels)": {"architecture": "standard", "l1_coefficient": 0.3},
    "matryoshka_standard": {"architecture": "matryoshka_standard", "l1_coefficient": 0.6},
    "matryoshka_standard, Nabeshima's options": {
        "architecture": "matryoshka_standard",
        "l1_coefficient": 0.3,
        "l1_of_every_prefix": True,
        **DRAWN,
    },
}
SCORES = ["mcc", "f1", "parent_recovery", "absorption", "explained_variance", "l0"]


def main() -> None:
    """Train everything and rewrite the page's tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--training-samples", type=int, default=1_024_000, help="of the synthetic model, for each SAE")
    parser.add_argument("--tinystories", type=Path, help="folder with model/ and data/; without it, no such table")
    parser.add_argument("--training-tokens", type=int, default=400_000)
    options = parser.parse_args()
    seeds = ", ".join(map(str, options.seeds))
    parts = [
        f"Made by `python benchmarks/variant_results.py --tinystories ../shared/tinystories`; {machine('cpu')}.",
        f"### Synthetic model with known features\n\n{options.training_samples:,} samples an SAE, seeds {seeds}: "
        "mean ± standard deviation.\n\n" + synthetic_table(options.seeds, options.training_samples),
    ]
    if options.tinystories is not None:
        parts.append(
            f"### TinyStories\n\nFraction of variance unexplained (FVU) by each level on fresh activations; "
            f"{options.training_tokens:,} tokens, one run.\n\n"
            + tinystories_table(options.tinystories, options.training_tokens)
        )
    begin, end = MARKERS
    page = PAGE.read_text(encoding="utf-8")
    text = "\n\n".join([begin, *parts, end])
    PAGE.write_text(re.sub(f"{begin}.*{end}", lambda _: text, page, flags=re.DOTALL), encoding="utf-8")


def synthetic_table(seeds: list[int], training_samples: int) -> str:
    """Scores of every variant, over seeds of the synthetic model and of the SAEs."""
    scores: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for seed in seeds:
        run = read_run_file("synthetic", [f"training_samples={training_samples}", f"synthetic_model.seed={seed}"])
        sizes = {"d_in": 96, "d_sae": 240}
        run["saes"] = {name: _sae(name, sizes, [20, 80, 240], k=5, warm_up=100) for name in VARIANTS}
        for sae in _trained(run):
            assert sae.scores is not None
            scores[sae.name].append(asdict(sae.scores))
    rows = [
        [name, *(_mean_and_spread([score[key] for score in of_seeds]) for key in SCORES)]
        for name, of_seeds in scores.items()
    ]
    return _table(["", "MCC", "F1", "parent recovery", "absorption (lower is better)", "EV", "L0"], rows)


def tinystories_table(folder: Path, training_tokens: int) -> str:
    """FVU of every level of every variant."""
    settings = [
        f"model_name={folder / 'model'}",
        f"dataset_path={folder / 'data'}",
        "hook_names=model.layers.2",
        "streaming=false",
        f"training_tokens={training_tokens}",
        "lr=1e-2",
        "lr_warm_up_steps=0",
        "lr_decay_steps=80",
        "dead_feature_window=20",
    ]
    run = read_run_file("tinystories", settings)
    for single_sae_only in ("sae", "hook_name", "is_dataset_tokenized"):
        del run[single_sae_only]
    widths = [64, 192, 448, 960, 2048]
    run["saes"] = {name: _sae(name, {"d_in": 64, "d_sae": 2048}, widths, k=16, warm_up=40) for name in VARIANTS}
    for sae in run["saes"].values():
        if sae["architecture"].endswith(("jumprelu", "standard")):
            sae["normalize_activations"] = "expected_average_only_in"  # their coefficients depend on the scale
        if "l1_coefficient" in sae:
            sae["l1_coefficient"] *= 4  # towards the L0 of the others
    rows: list[list[str]] = []
    for sae in _trained(run):
        levels = [f"{level.fvu:.3f}" for level in sae.levels]
        full = sae.levels[-1]
        dead = f"{full.dead / full.width:.0%}"
        rows.append([sae.name, *[""] * (len(widths) - len(levels)), *levels, f"{full.l0:.1f}", dead])
    return _table(["", *map(str, widths), "L0", "dead"], rows)


def _sae(name: str, sizes: dict[str, int], widths: list[int], k: int, warm_up: int) -> dict[str, Any]:
    """A variant's config at a size."""
    sae: dict[str, Any] = {**VARIANTS[name], **sizes}
    architecture = sae["architecture"]
    if architecture.startswith("matryoshka"):
        sae["matryoshka_widths"] = widths
    if architecture.endswith("jumprelu"):
        sae["target_l0"] = float(k)
        sae["l0_warm_up_steps"] = warm_up
    elif architecture.endswith("standard"):
        sae["l1_warm_up_steps"] = warm_up
    else:
        sae["k"] = k * sae.get("k", 1)
    return sae


def _trained(run: dict[str, Any]) -> list[TrainedSAE]:
    with tempfile.TemporaryDirectory() as folder:
        return train(run, Path(folder) / "output").saes


def _mean_and_spread(values: list[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} ± {spread:.3f}"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    main()
