"""How well each level of a Matryoshka SAE does on given activations: L0, variance unexplained, dead latents."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from sae_lens.evals import ExplainedVarianceCalculator
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_matryoshka.saes.matryoshka_sae import MatryoshkaSAE
from sae_lens_matryoshka.saes.standardized_channels import channels_that_vary
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

    Explained variance is SAELens's, taken over all samples together (``ExplainedVarianceCalculator``); beside it stands
    that of standardized channels, which a channel of most of the variance does not decide.

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
    unexplained_of_channels = _UnexplainedOfChannels(sae.n_levels, sae.cfg.d_in)
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
                for level, reconstruction in enumerate(reconstructions):
                    explained_variance[level].add_batch(reconstruction, x)
                    unexplained_of_channels.add_residual(level, reconstruction, x)
                unexplained_of_channels.add_activations(x)
            n_seen += batch.shape[0]
            progress.update(batch.shape[0])
            if n_seen >= n_samples:
                break
    if n_seen == 0:
        raise ValueError("There are no activations to measure the levels on.")
    fvu_standardized = unexplained_of_channels.shares()
    return [
        LevelMetrics(
            level=level,
            width=width,
            l0=n_firings[level].sum().item() / n_seen,
            fvu=1 - explained_variance[level].compute(),
            fvu_standardized=fvu_standardized[level],
            dead=int((n_firings[level, :width] == 0).sum()),
            dense=int((n_firings[level, :width] > DENSE_SHARE * n_seen).sum()),
            above_half=int((n_firings[level, :width] > n_seen / 2).sum()),
            n_samples=n_seen,
        )
        for level, width in enumerate(sae.widths)
    ]


class _UnexplainedOfChannels:
    """Each channel's squared residuals by level, and its variance, in float64."""

    def __init__(self, n_levels: int, d_in: int) -> None:
        self.squared_residuals = torch.zeros(n_levels, d_in, dtype=torch.float64)
        self.sums = torch.zeros(2, d_in, dtype=torch.float64)
        self.first: Tensor | None = None
        self.n_samples = 0

    def add_residual(
        self, level: int, reconstruction: Float[Tensor, "*batch d_in"], x: Float[Tensor, "*batch d_in"]
    ) -> None:
        residual = (reconstruction - x.to(torch.promote_types(x.dtype, torch.float32))).reshape(-1, x.shape[-1])
        self.squared_residuals[level] += residual.pow(2).sum(0, dtype=torch.float64).cpu()

    def add_activations(self, x: Float[Tensor, "*batch d_in"]) -> None:
        x = x.reshape(-1, x.shape[-1]).double()
        if self.first is None:
            self.first = x[0]
        centred = x - self.first  # squares of a channel whose mean is much larger than its deviation would cancel
        self.sums += torch.stack([centred.sum(0), centred.pow(2).sum(0)]).cpu()
        self.n_samples += x.shape[0]

    def shares(self) -> list[float]:
        """The mean share of a channel's variance that each level leaves; nan if no channel varies."""
        assert self.first is not None
        mean, mean_square = self.sums / self.n_samples
        variance = (mean_square - mean.pow(2)).clamp(min=0)
        varying = channels_that_vary(self.first.cpu() + mean, variance.sqrt())
        shares = self.squared_residuals[:, varying] / (self.n_samples * variance[varying])
        return shares.mean(1).tolist()
