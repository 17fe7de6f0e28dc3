"""The run file synthsaebench-mini over seeds and sparsities: the tables and the plot of docs/synthsaebench.md.

    python benchmarks/synthsaebench.py --work DIR train          # goes on where it was stopped
    python benchmarks/synthsaebench.py --work DIR tables         # of what there is by then

A seed makes its own world: features, hierarchy, samples and starts. All SAEs of a world share its pool of samples.
"""

import argparse
import csv
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sae_lens.synthetic import SyntheticModel
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from tqdm.auto import trange
from train_step import machine

from sae_lens_matryoshka import read_run_file, train
from sae_lens_matryoshka.run_files.building import build_runner_configs

RUN = "synthsaebench-mini"
PAGE = Path(__file__).parents[1] / "docs" / "synthsaebench.md"
PLOT = "synthsaebench_by_l0.png"
PROBES = "probes.csv"
METRICS = {
    "f1": "F1", "precision": "precision", "recall": "recall", "mcc": "MCC", "uniqueness": "uniqueness",
    "explained_variance": "EV", "l0": "L0", "dead": "dead", "absorption": "absorption",
    "parent_recovery": "parent recovery",
}  # fmt: skip


def main() -> None:
    """Train or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="SAEs and scores go there")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--k", type=int, nargs="+", default=[8, 6, 10, 12], help="the first is that of the table")
    parser.add_argument("--sample-pool", type=int, default=614_400)
    parser.add_argument("--set", action="append", default=[], help="more settings of the run file")
    parser.add_argument("step", choices=["train", "tables"])
    options = parser.parse_args()
    {"train": train_all, "tables": write_tables}[options.step](options)


def train_all(options: argparse.Namespace) -> None:
    """Train what is not there yet, all contenders of a world at a time, and its probes."""
    for k in options.k:
        for seed in options.seeds:
            output = _folder(options, k, seed)
            settings = [f"synthetic_model.seed={seed}", f"sae.k={k}", f"output_path={output}", *options.set]
            run = read_run_file(RUN, settings)
            if not (output / "scores.csv").is_file():
                train(run, sample_pool=options.sample_pool, force=True)
            if k == options.k[0] and not (output / PROBES).is_file():
                world = next(iter(build_runner_configs(run).values())).synthetic_model  # type: ignore[union-attr]
                (output / PROBES).write_text(f"f1\n{probe_ceiling(SyntheticModel.load_from_source(world))}\n")


def probe_ceiling(world: SyntheticModel, n_samples: int = 60_000, n_steps: int = 1500, batch_size: int = 4096) -> float:
    """Mean F1 of a logistic regression a feature on the world's activations, on samples that it has not seen.

    Args:
        world: The synthetic model.
        n_samples: To train on, and as many again to test on.
        n_steps: Steps of Adam.
        batch_size: Samples a step.
    """
    torch.manual_seed(0)
    (x, fires), (x_test, fires_test) = (_standardized(*world.sample_with_features(n_samples)) for _ in range(2))
    weight = torch.zeros(x.shape[1], fires.shape[1], requires_grad=True)
    bias = torch.logit(fires.float().mean(0).clamp(1e-5, 1 - 1e-5)).requires_grad_()
    adam = torch.optim.Adam([weight, bias], lr=0.02)
    schedule = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.01, n_steps)
    for _ in trange(n_steps, desc="probes", leave=False):
        rows = torch.randint(len(x), (batch_size,))
        loss = binary_cross_entropy_with_logits(x[rows] @ weight + bias, fires[rows].float(), reduction="none")
        adam.zero_grad()
        loss.mean(0).sum().backward()
        adam.step()
        schedule.step()
    with torch.no_grad():
        told = x_test @ weight + bias > 0
    right = (told & fires_test).sum(0)
    f1 = 2 * right / (told.sum(0) + fires_test.sum(0)).clamp(min=1)
    return f1[_most_frequent(fires_test, 512)].mean().item()


def _standardized(x: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    return (x - x.mean(0)) / x.std(0), features > 0


def _most_frequent(fires: Tensor, n: int) -> Tensor:
    """As many features as the SAEs have latents."""
    return fires.sum(0).topk(n).indices


def write_tables(options: argparse.Namespace) -> None:
    """Put what has been measured between the page's markers, and draw the plot."""
    scores = {k: read_scores([_folder(options, k, seed) for seed in options.seeds]) for k in options.k}
    main_k = options.k[0]
    ceilings = [_column(_folder(options, main_k, seed) / PROBES, "f1")[0] for seed in options.seeds
                if (_folder(options, main_k, seed) / PROBES).is_file()]  # fmt: skip
    rows = [
        [name, str(len(runs)), *(_spread([float(run[m]) for run in runs], 1 if m == "dead" else 3) for m in METRICS)]
        for name, runs in scores[main_k].items()
    ]
    if ceilings:
        rows.append(
            ["logistic-regression probes", str(len(ceilings)), _spread(ceilings, 3), *["-"] * (len(METRICS) - 1)]
        )
    parts = [
        f"Made by `python benchmarks/synthsaebench.py`; {machine('cpu')}.",
        f"k {main_k}, mean ± standard deviation over worlds:",
        _markdown(["SAE", "worlds", *METRICS.values()], rows),
    ]
    begin, end = "<!-- results: begin -->", "<!-- results: end -->"
    before, rest = PAGE.read_text(encoding="utf-8").split(begin)
    PAGE.write_text(f"{before}{begin}\n\n" + "\n\n".join(parts) + f"\n\n{end}{rest.split(end)[1]}", encoding="utf-8")
    plot(scores, statistics.mean(ceilings) if ceilings else None)


def plot(scores: dict[int, dict[str, list[dict[str, str]]]], ceiling: float | None) -> None:
    """F1 and MCC against L0 for each contender."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    names = list(next(iter(scores.values())))
    for axes, metric in zip(panels, ("f1", "mcc"), strict=True):
        for name in names:
            points = sorted(
                tuple(statistics.mean(float(run[m]) for run in of_k[name]) for m in ("l0", metric))
                for of_k in scores.values()
                if of_k.get(name)
            )
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
        if metric == "f1" and ceiling is not None:
            axes.axhline(ceiling, linestyle=":", color="grey", label="probes")
        axes.set_title(METRICS[metric])
        axes.set_xlabel("L0")
    lines, labels = panels[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=6, fontsize=8)
    figure.savefig(PAGE.parent / PLOT, dpi=150)


def read_scores(folders: Iterable[Path]) -> dict[str, list[dict[str, str]]]:
    """The rows of ``scores.csv`` by SAE, one for each world that has been trained."""
    scores: dict[str, list[dict[str, str]]] = {}
    for folder in folders:
        if (folder / "scores.csv").is_file():
            with (folder / "scores.csv").open(encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    scores.setdefault(row["sae"], []).append(row)
    return scores


def _folder(options: argparse.Namespace, k: int, seed: int) -> Path:
    return options.work / f"k_{k}-seed_{seed}"


def _column(path: Path, name: str) -> list[float]:
    with path.open(encoding="utf-8") as file:
        return [float(row[name]) for row in csv.DictReader(file)]


def _spread(values: Sequence[float], digits: int) -> str:
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ±{statistics.stdev(values):.{digits}f}"


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
