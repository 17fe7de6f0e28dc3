"""How well an SAE finds the features of a SAELens synthetic model with a feature hierarchy, and a plot of it.

In such a model child features fire only where their parent fires. A sparse dictionary can then save an active latent by
writing the parent into its children's latents: absorption (Chanin et al., arXiv:2409.14507), the fault that Matryoshka
SAEs are made to avoid (arXiv:2503.17547).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sae_lens import SAE
from sae_lens.synthetic import HierarchyNode, SyntheticModel, eval_sae_on_synthetic_data
from sae_lens.util import cosine_similarities
from torch import Tensor

from sae_lens_matryoshka.levels import recorded_widths
from sae_lens_matryoshka.untrusted.figure_text import text_as_it_stands

RECOVERED_COSINE = 0.9
"""A feature counts as recovered if a decoder direction has at least this cosine similarity with it."""


@dataclass(frozen=True)
class SyntheticScores:
    """How well an SAE does on a synthetic model; fractions of 1 unless said otherwise."""

    mcc: float
    """Mean correlation coefficient between decoder directions and features (SAELens, arXiv:2505.20254)."""

    f1: float
    """Mean F1 of the latents as detectors of the features they match best (SAELens)."""

    explained_variance: float
    """Share of the activations' variance that the whole SAE explains."""

    l0: float
    """Mean number of latents that fire a sample."""

    parent_recovery: float
    """Share of parent features recovered among the latents of the smallest level. An SAE without levels is given as
    many latents, those that fire most often."""

    absorption: float
    """Share of the samples with an active parent where the parent's best-matching latent is silent and that of one of
    its children fires, averaged over parents; nan without a hierarchy."""

    precision: float
    """Mean precision of the latents as detectors of the features they match best (SAELens)."""

    recall: float
    """Their mean recall (SAELens)."""

    uniqueness: float
    """Number of different features that latents match best, as a share of the latents (SAELens)."""

    dead: int
    """Latents that never fired (SAELens)."""


SCORE_LABELS = {
    "mcc": "MCC",
    "f1": "F1",
    "parent_recovery": "parent recovery,\nsmallest level",
    "absorption": "absorption\n(lower is better)",
    "explained_variance": "explained\nvariance",
}


@torch.no_grad()
def score_on_synthetic_model(
    sae: SAE[Any],
    synthetic_model: SyntheticModel,
    n_samples: int = 100_000,
    batch_size: int = 4096,
    n_smallest: int | None = None,
) -> SyntheticScores:
    """Score an SAE on fresh samples of a synthetic model.

    Args:
        sae: An SAE for the model's activations, as used for inference.
        synthetic_model: The model that makes the samples; its hierarchy says which features are parents.
        n_samples: How many samples to score on.
        batch_size: How many of them to encode at once.
        n_smallest: Number of latents that count as the smallest level; None takes the SAE's first width, or for an SAE
            without levels 1/32 of its latents.
    """
    evaluation = eval_sae_on_synthetic_data(
        sae, synthetic_model.feature_dict, synthetic_model.activation_generator, n_samples, batch_size
    )
    features = synthetic_model.feature_dict.feature_vectors
    similarities = cosine_similarities(sae.W_dec, features)
    families = list(parents_and_children(synthetic_model))
    n_firings, absorption = _firings_and_absorption(
        sae, synthetic_model, similarities.argmax(0), families, n_samples, batch_size
    )
    widths = recorded_widths(sae.cfg.to_dict())
    if n_smallest is None:
        n_smallest = widths[0] if widths else max(1, sae.cfg.d_sae // 32)
    small_latents = torch.arange(n_smallest) if widths else n_firings.topk(n_smallest).indices
    parents = [parent for parent, _ in families]
    return SyntheticScores(
        mcc=evaluation.mcc,
        f1=evaluation.classification.f1_score,
        explained_variance=evaluation.explained_variance,
        l0=evaluation.sae_l0,
        parent_recovery=(similarities[small_latents][:, parents].amax(0) >= RECOVERED_COSINE).float().mean().item(),
        absorption=absorption,
        precision=evaluation.classification.precision,
        recall=evaluation.classification.recall,
        uniqueness=evaluation.uniqueness,
        dead=evaluation.dead_latents,
    )


def parents_and_children(synthetic_model: SyntheticModel) -> Iterator[tuple[int, list[int]]]:
    """Every feature of the hierarchy that has children, with the indices of those children."""
    to_visit: list[HierarchyNode] = list(synthetic_model.hierarchy.roots) if synthetic_model.hierarchy else []
    while to_visit:
        node = to_visit.pop()
        to_visit.extend(node.children)
        children = [child.feature_index for child in node.children if child.feature_index is not None]
        if node.feature_index is not None and children:
            yield node.feature_index, children


@text_as_it_stands()
def plot_scores(scores: Mapping[str, SyntheticScores], path: Path) -> None:
    """Draw the scores of several SAEs side by side into a PNG file."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    width = 0.8 / len(scores)
    for index, (name, sae_scores) in enumerate(scores.items()):
        positions = [x + (index - (len(scores) - 1) / 2) * width for x in range(len(SCORE_LABELS))]
        bars = axes.bar(positions, [getattr(sae_scores, key) for key in SCORE_LABELS], width, label=name)
        axes.bar_label(bars, fmt="%.2f", fontsize=8)
    axes.set_xticks(range(len(SCORE_LABELS)), list(SCORE_LABELS.values()))
    axes.set_ylim(0, 1.1)
    axes.set_ylabel("score")
    axes.set_title("Features of the synthetic model found by each SAE")
    axes.legend(axes.containers, list(scores), loc="upper center", ncols=len(scores), bbox_to_anchor=(0.5, -0.15))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _firings_and_absorption(
    sae: SAE[Any],
    synthetic_model: SyntheticModel,
    best_latent: Int[Tensor, " n_features"],
    families: list[tuple[int, list[int]]],
    n_samples: int,
    batch_size: int,
) -> tuple[Int[Tensor, " d_sae"], float]:
    n_firings = torch.zeros(sae.cfg.d_sae, dtype=torch.long, device=sae.device)
    n_active = torch.zeros(len(families))
    n_absorbed = torch.zeros(len(families))
    for start in range(0, n_samples, batch_size):
        hidden_acts, feature_acts = synthetic_model.sample_with_features(min(batch_size, n_samples - start))
        fires = sae.encode(hidden_acts) != 0
        n_firings += fires.sum(0)
        for index, (parent, children) in enumerate(families):
            active = feature_acts[:, parent] > 0
            # a child that shares its parent's best latent is silent with it
            absorbed = active & ~fires[:, best_latent[parent]] & fires[:, best_latent[children]].any(1)
            n_active[index] += active.sum().item()
            n_absorbed[index] += absorbed.sum().item()
    seen = n_active > 0
    return n_firings, (n_absorbed[seen] / n_active[seen]).mean().item()
