"""The order in which training reads an activation cache: shuffled as a whole, anew each epoch, with a position to keep.

Rows come from the whole cache with equal chances. A buffer that is filled in the order of the text would mix only what
lies close together; benchmarks/activation_cache.py has what that costs.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_matryoshka.activation_cache.cache import ActivationCache


class ShuffledBatches(Iterator[dict[str, Tensor]]):
    """Batches of the rows that are trained on, without end: every one of them once an epoch.

    What an epoch's last rows leave of a batch is filled with the next epoch's first. The next batch is read in the
    background. It is no part of the position, which is that of the batches handed out.

    Args:
        cache: The cache.
        hooks: The hooks to read; all of them at the same rows.
        batch_size: Rows of a batch; within one they are in ascending order.
        seed: Decides, together with the number of the epoch, on the order.
        device: Where batches go.
    """

    def __init__(
        self, cache: ActivationCache, hooks: Sequence[str], batch_size: int, seed: int, device: str | torch.device
    ) -> None:
        self.cache = cache
        self.hooks = list(hooks)
        self.batch_size = batch_size
        self.seed = seed
        self.device = device
        self.go_to(0, 0)

    def go_to(self, epoch: int, n_read: int) -> None:
        """Go on after the first ``n_read`` rows of an epoch."""
        self.epoch, self.n_read = epoch, n_read
        self._order = self._order_of(epoch)
        self._next: tuple[tuple[int, int], Callable[[], dict[str, Tensor]]] | None = None

    def __next__(self) -> dict[str, Float[Tensor, "batch d_in"]]:
        position, finish = self._begin(self.epoch, self.n_read) if self._next is None else self._next
        batch = finish()
        self.epoch, self.n_read = position
        self._next = self._begin(self.epoch, self.n_read)
        return {hook: activations.to(self.device).float() for hook, activations in batch.items()}

    def _begin(self, epoch: int, n_read: int) -> tuple[tuple[int, int], Callable[[], dict[str, Tensor]]]:
        """Begin to read a batch, and say where the one after it begins."""
        numbers = self._order[n_read : n_read + self.batch_size]
        n_read += len(numbers)
        if len(numbers) < self.batch_size:
            epoch, n_read = epoch + 1, self.batch_size - len(numbers)
            self._order = self._order_of(epoch)
            numbers = torch.cat([numbers, self._order[:n_read]])
        rows = self.cache.training_rows(numbers.long()).sort().values
        return (epoch, n_read), self.cache.begin_reading(self.hooks, rows)

    def _order_of(self, epoch: int) -> Int[Tensor, " n_training"]:
        n_training = self.cache.n_training
        # torch's CPU generator takes 32 bits of a seed; this mixes both numbers into them, the same in every release
        seed = int(np.random.SeedSequence([self.seed, epoch]).generate_state(1)[0])
        dtype = torch.int32 if n_training < 2**31 else torch.int64
        return torch.randperm(n_training, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def held_out_batches(
    cache: ActivationCache, hook: str, batch_size: int, device: str | torch.device
) -> Iterator[Float[Tensor, "batch d_in"]]:
    """What no run trains on, once.

    Args:
        cache: The cache.
        hook: The hook to read.
        batch_size: Rows of a batch; the last one has what is left.
        device: Where batches go.
    """
    for rows in cache.held_out_rows().split(batch_size):
        yield cache.begin_reading([hook], rows.sort().values)()[hook].to(device).float()
