"""Samples of a synthetic model drawn once for every SAE of a run: drawing is most of the time on a CPU."""

from typing import Any

import torch
from jaxtyping import Float
from sae_lens.synthetic import SyntheticModel
from torch import Tensor
from tqdm.auto import tqdm

DRAWN_AT_ONCE = 4096


class SamplePool:
    """What SAELens's runner reads of a synthetic model, giving out samples that are drawn already.

    Every epoch goes through the whole pool in an order of its own; what is left of it at its end, less than a batch, is
    passed over. Each SAE gets the same samples in the same order, from :meth:`restart` on.

    Args:
        synthetic_model: The model to draw from.
        n_samples: How many samples to draw; they stay in the memory of the model's device.

    Raises:
        ValueError: If the batches are larger than the pool.
    """

    def __init__(self, synthetic_model: SyntheticModel, n_samples: int) -> None:
        self.cfg = synthetic_model.cfg
        sizes = [min(DRAWN_AT_ONCE, n_samples - start) for start in range(0, n_samples, DRAWN_AT_ONCE)]
        progress = tqdm(sizes, desc="Drawing samples", leave=False)
        self.samples = torch.cat([synthetic_model.sample(size) for size in progress])
        self.restart()

    def restart(self) -> None:
        """Begin at the first epoch again."""
        self._generator = torch.Generator().manual_seed(self.cfg.seed or 0)
        self._order = torch.empty(0, dtype=torch.long)
        self._place = 0

    @property
    def activation_generator(self) -> Any:
        """Gives out a batch of the pool, in place of which features fire how strongly."""
        return self._next_batch

    @property
    def feature_dict(self) -> Any:
        """Leaves a batch as it is: the pool holds the model's activations."""
        return _AsTheyAre(self.samples)

    def _next_batch(self, batch_size: int) -> Float[Tensor, "batch_size hidden_dim"]:
        if batch_size > len(self.samples):
            raise ValueError(f"A batch of {batch_size} is more than the pool's {len(self.samples)} samples.")
        if self._place + batch_size > len(self._order):
            self._order, self._place = torch.randperm(len(self.samples), generator=self._generator), 0
        rows = self._order[self._place : self._place + batch_size]
        self._place += batch_size
        return self.samples[rows.to(self.samples.device)]


class _AsTheyAre:
    def __init__(self, feature_vectors: Tensor) -> None:
        self.feature_vectors = feature_vectors  # whose device is asked for

    def __call__(self, samples: Tensor) -> Tensor:
        return samples
