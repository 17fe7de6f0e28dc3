"""SAELens's mixing buffer as an object whose contents and random state can be saved and taken up again.

SAELens's ``mixing_buffer`` is a generator: what it holds cannot be read from outside. This one serves the same batches.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm


class ResumableMixingBuffer(Iterator[Tensor]):
    """Mixes old with new activations exactly as ``sae_lens.training.mixing_buffer.mixing_buffer`` does.

    Activations are gathered until there are ``buffer_size``, shuffled, and served in batches until only the share to be
    mixed with the next ones is left.

    Args:
        activations_loader: Gives new activations, (any, d_in) each. Where it ends, this ends.
        buffer_size: How many activations to gather before they are shuffled and served.
        batch_size: How many activations a batch holds.
        mix_fraction: The share of ``buffer_size`` that is kept for mixing; with 0 nothing is shuffled.
        generator: Where the shuffles come from, a CPU generator.

    Raises:
        ValueError: If ``buffer_size`` is below ``batch_size`` or ``mix_fraction`` not in [0, 1].
    """

    def __init__(
        self,
        activations_loader: Iterator[Float[Tensor, "any d_in"]],
        buffer_size: int,
        batch_size: int,
        mix_fraction: float,
        generator: torch.Generator,
    ) -> None:
        if buffer_size < batch_size:
            raise ValueError(f"buffer_size={buffer_size} must be at least batch_size={batch_size}.")
        if not 0 <= mix_fraction <= 1:
            raise ValueError(f"mix_fraction={mix_fraction} must be in [0, 1].")
        self.activations_loader = activations_loader
        self.buffer_size = buffer_size
        self.batch_size = batch_size
        self.mix_fraction = mix_fraction
        self.generator = generator
        self.activations: Float[Tensor, "any d_in"] | None = None
        """What has been loaded and not been served, in the order of serving."""
        self.n_batches_ready = 0
        """How many batches of it are served before the next activations are loaded."""

    @torch.no_grad()
    def __next__(self) -> Float[Tensor, "batch d_in"]:
        if self.n_batches_ready == 0:
            self._fill()
        assert self.activations is not None
        batch, self.activations = self.activations[: self.batch_size], self.activations[self.batch_size :]
        self.n_batches_ready -= 1
        return batch

    def _fill(self) -> None:
        """Load until there are batches to serve, with a bar where that takes long."""
        with tqdm(
            total=self.buffer_size, initial=0 if self.activations is None else len(self.activations),
            desc="Filling activation buffer", unit=" tokens", unit_scale=True, leave=False, delay=2,
        ) as progress:  # fmt: skip
            while self.n_batches_ready == 0:
                progress.update(self._load_more())

    def _load_more(self) -> int:
        new = next(self.activations_loader)
        activations = new if self.activations is None else torch.cat([self.activations, new])
        if len(activations) >= self.buffer_size:
            if self.mix_fraction > 0:
                activations = activations[torch.randperm(len(activations), generator=self.generator)]
            n_to_serve = len(activations) - int(self.buffer_size * self.mix_fraction)
            self.n_batches_ready = max(1, n_to_serve // self.batch_size)
        self.activations = activations
        return len(new)
