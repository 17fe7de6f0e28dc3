"""What the trainer hands a training SAE for one step."""

from collections.abc import Sequence

import torch
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor


def train_step_input(
    sae_in: Tensor,
    dead: Tensor | None = None,
    coefficients: dict[str, float] | None = None,
    step: int = 0,
    is_logging_step: bool = False,
) -> TrainStepInput:
    """A step on given activations, with sparsity coefficients of 1 unless others are given.

    Args:
        sae_in: Activations, (batch, d_in).
        dead: Which latents are dead, (d_sae,) of bool.
        coefficients: Of the sparsity losses, by name.
        step: The number of the step.
        is_logging_step: Whether the step's figures are logged.
    """
    coefficients = {"l0": 1.0, "l1": 1.0} if coefficients is None else coefficients
    return TrainStepInput(sae_in, coefficients, dead, step, is_logging_step)


def dead_mask(dead: Sequence[int], d_sae: int) -> Tensor:
    """Which of the latents are dead, (d_sae,) of bool."""
    mask = torch.zeros(d_sae, dtype=torch.bool)
    mask[list(dead)] = True
    return mask


def activations(batch: int, d_in: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal random activations that a seed determines, (batch, d_in)."""
    return torch.randn(batch, d_in, generator=torch.Generator().manual_seed(seed), dtype=dtype)
