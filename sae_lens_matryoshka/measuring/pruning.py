"""What leave-one-out pruning costs and saves at each threshold, to choose one by."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from sae_lens.evals import ExplainedVarianceCalculator
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_matryoshka.measuring.level_metrics import FEWEST_SAMPLES, MOST_ACTIVATIONS
from sae_lens_matryoshka.saes.matryoshka_sae import MatryoshkaSAE


@dataclass(frozen=True)
class PruningFigures:
    """What one threshold leaves."""

    prune_below: float
    """The threshold, as ``MatryoshkaSAE.encode`` takes it; minus infinity prunes nothing."""

    l0: float
    """Mean number of latents left a sample."""

    fvu: float
    """Fraction of variance unexplained from those."""


@torch.no_grad()
def measure_pruning(
    sae: MatryoshkaSAE,
    activations: Iterable[Float[Tensor, "batch d_in"]],
    thresholds: Sequence[float],
    level: int | None = None,
    n_samples: int = 100_000,
) -> list[PruningFigures]:
    """Measure thresholds of ``encode(x, level, prune_below)`` side by side, encoding once.

    Args:
        sae: The SAE to measure.
        activations: Batches of shape (batch, d_in); only as many are drawn as are needed.
        thresholds: The thresholds to try.
        level: Index of the level; None is the full one.
        n_samples: How many samples to use. Fewer are used if ``activations`` ends early.

    Returns:
        The figures without pruning first, then those of each threshold.

    Raises:
        IndexError: If there is no such level.
        ValueError: If ``n_samples`` is not positive, or there are no activations.
    """
    if n_samples < 1:
        raise ValueError(f"n_samples={n_samples} must be positive.")
    tried = [float("-inf"), *thresholds]
    explained, n_left = [ExplainedVarianceCalculator() for _ in tried], [0] * len(tried)
    n_seen = 0
    block_size = max(FEWEST_SAMPLES, MOST_ACTIVATIONS // sae.cfg.d_sae)
    with tqdm(total=n_samples, desc="Measuring pruning", leave=False) as progress:
        for batch in activations:
            batch = batch[: n_samples - n_seen].to(sae.device)
            for x in batch.split(block_size):
                acts = sae.encode(x, level)
                rows, latents, gains = sae.leave_one_out_gains(sae.process_sae_in(x), acts)
                for index, threshold in enumerate(tried):
                    pruned = gains <= threshold
                    left = acts.clone()
                    left[rows[pruned], latents[pruned]] = 0
                    n_left[index] += int((~pruned).sum())
                    sae.process_sae_in(x)  # SAELens uses the statistics of a normalized sample up as it decodes
                    explained[index].add_batch(sae.decode(left, level), x)
            n_seen += len(batch)
            progress.update(len(batch))
            if n_seen >= n_samples:
                break
    if n_seen == 0:
        raise ValueError("There are no activations to measure pruning on.")
    return [
        PruningFigures(threshold, l0=n / n_seen, fvu=1 - calculator.compute())
        for threshold, n, calculator in zip(tried, n_left, explained, strict=True)
    ]
