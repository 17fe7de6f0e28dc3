"""How well each level of a Matryoshka SAE does on given activations: L0, variance unexplained, dead latents."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from sae_lens.evals import ExplainedVarianceCalculator
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_matryoshka.saes.matryoshka_sae import MatryoshkaSAE
from sae_lens_matryoshka.saved.level_figures import DENSE_SHARE, LevelMetrics

MOST_ACTIVATIONS = 2**24
"""Latent activations held at once: 64 MB in float32."""

FEWEST_SAMPLES = 64
"""Samples encoded together however wide the SAE is: with fewer, reading its weights would take most of the time."""


@torch.no_grad()
def measure_levels(
    sae: MatryoshkaSAE, activations: Iterable[Float[Tensor, "batch d_in"]], n_samples: int = 100_000
) -> list[LevelMetrics]:
    """Measure all levels of an SAE in one pass over the activations.

    Explained variance is SAELens's, taken over all samples together (``ExplainedVarianceCalculator``).

    Args:
        sae: The SAE to measure.
        activations: Batches of shape (batch, d_in); only as many are drawn as are needed.
        n_samples: How many samples to use. Fewer are used if ``activations`` ends early.

    Returns:
        One entry a level, smallest level first.

    Raises:
        ValueError: If ``n_samples`` is not positive, or there are no activations.
    """
    if n_samples < 1:
        raise ValueError(f"n_samples={n_samples} must be positive.")
    explained_variance = [ExplainedVarianceCalculator() for _ in sae.widths]
    n_firings = torch.zeros(sae.n_levels, sae.cfg.d_sae, dtype=torch.long, device=sae.device)
    n_seen = 0
    # so that measuring an SAE takes less memory than training it
    block_size = max(FEWEST_SAMPLES, MOST_ACTIVATIONS // sae.cfg.d_sae)
    with tqdm(total=n_samples, desc="Measuring levels", leave=False) as progress:
        for batch in activations:
            batch = batch[: n_samples - n_seen].to(sae.device)
            for x in batch.split(block_size):
                level_acts = sae.encode_levels(x)
                for level, acts in enumerate(level_acts):
                    n_firings[level][: acts.shape[-1]] += (acts != 0).reshape(-1, acts.shape[-1]).sum(0)
                reconstructions = sae.decode_each_level(level_acts)
                for calculator, reconstruction in zip(explained_variance, reconstructions, strict=True):
                    calculator.add_batch(reconstruction, x)
            n_seen += batch.shape[0]
            progress.update(batch.shape[0])
            if n_seen >= n_samples:
                break
    if n_seen == 0:
        raise ValueError("There are no activations to measure the levels on.")
    return [
        LevelMetrics(
            level=level,
            width=width,
            l0=n_firings[level].sum().item() / n_seen,
            fvu=1 - explained_variance[level].compute(),
            dead=int((n_firings[level, :width] == 0).sum()),
            dense=int((n_firings[level, :width] > DENSE_SHARE * n_seen).sum()),
            n_samples=n_seen,
        )
        for level, width in enumerate(sae.widths)
    ]
