"""The nested reconstruction losses of a Matryoshka SAE and their exact gradient, in one pass over the non-zeros.

With residuals r_l = b_dec + sum_{i < w_l} a_i W_i - x of level l, the loss is sum_l c_l mean_b |r_l|^2. Level l adds
its own latents to level l - 1, so running sums give all residuals. A latent i of level l(i) enters the residuals of
that level and all larger ones, so with the suffix sums R_l = (2 / batch) sum_{m >= l} c_m r_m

    dL/da_bi = <W_i, R_l(i)[b]>      dL/dW_i = sum_b a_bi R_l(i)[b]      dL/db_dec = sum_b R_1[b]

Any number of levels costs the three passes over the non-zeros that one costs (loss: arXiv:2503.17547, section 3).
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_matryoshka.ops.latents import ActiveLatents
from sae_lens_matryoshka.ops.sparse import sampled_products, weighted_row_sums

BLOCK_ELEMENTS = 2**17
"""Elements of a level that are worked on at once on CPU: 512 KB in float32."""


class NestedErrors(NamedTuple):
    """What the levels of a dictionary leave unexplained of a batch."""

    loss: Float[Tensor, ""]
    """The levels' squared errors, weighted and summed. Alone carries the gradient."""

    squared_errors: Float[Tensor, " n_levels"]
    """Each level's squared error, summed over dimensions and averaged over samples."""

    residual: Float[Tensor, "batch d_in"]
    """The full level's reconstruction minus the target."""

    level_residuals: Float[Tensor, "n_levels batch d_in"] | None
    """The same for every level, if asked for."""


def nested_errors_reference(
    coefficients: Float[Tensor, "batch d_sae"],
    W_dec: Float[Tensor, "d_sae d_in"],
    b_dec: Float[Tensor, " d_in"],
    target: Float[Tensor, "batch d_in"],
    widths: list[int],
    level_weights: list[float] | None = None,
    row_scale: Float[Tensor, "batch 1"] | None = None,
) -> NestedErrors:
    """The errors of all levels by their definition, a dense product a level.

    Args:
        coefficients: What each latent's decoder row is multiplied by, for each sample.
        W_dec: Decoder weights.
        b_dec: Decoder bias.
        target: What to reconstruct.
        widths: The level widths, smallest first.
        level_weights: The weight of each level's squared error in the loss; None for 1.
        row_scale: What the residuals of each sample are multiplied by before squaring; None for 1.
    """
    residuals = torch.stack([coefficients[:, :width] @ W_dec[:width] + b_dec - target for width in widths])
    scaled = residuals if row_scale is None else residuals * row_scale
    squared_errors = scaled.pow(2).sum(-1).mean(-1)
    weights = squared_errors.new_tensor(level_weights or [1.0] * len(widths))
    loss = (weights * squared_errors).sum()
    return NestedErrors(loss, squared_errors.detach(), residuals[-1].detach(), residuals.detach())


def nested_errors(
    coefficients: Float[Tensor, " n"],
    W_dec: Float[Tensor, "d_sae d_in"],
    b_dec: Float[Tensor, " d_in"],
    target: Float[Tensor, "batch d_in"],
    latents: ActiveLatents,
    level_weights: list[float] | None = None,
    row_scale: Float[Tensor, "batch 1"] | None = None,
    keep_level_residuals: bool = False,
) -> NestedErrors:
    """The same as :func:`nested_errors_reference`, from the non-zeros only.

    Args:
        coefficients: What the decoder row of each active latent is multiplied by, in the order of ``latents``.
        W_dec: Decoder weights.
        b_dec: Decoder bias.
        target: What to reconstruct; gets no gradient.
        latents: The active latents.
        level_weights: The weight of each level's squared error in the loss; None for 1.
        row_scale: What the residuals of each sample are multiplied by before squaring; None for 1.
        keep_level_residuals: Whether to return every level's residual, which costs an array of that size.
    """
    weights = level_weights or [1.0] * len(latents.widths)
    outputs = _NestedErrors.apply(coefficients, W_dec, b_dec, target, latents, weights, row_scale, keep_level_residuals)
    return NestedErrors(*outputs)  # type: ignore[misc]


class _NestedErrors(torch.autograd.Function):
    """Turns the residuals into their suffix sums while they are at hand, so that a single array serves both passes."""

    @staticmethod
    def forward(
        ctx: Any,
        coefficients: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        target: Tensor,
        latents: ActiveLatents,
        level_weights: list[float],
        row_scale: Tensor | None,
        keep_level_residuals: bool,
    ) -> tuple[Tensor | None, ...]:
        n_levels, d_in = len(latents.widths), W_dec.shape[1]
        levels = weighted_row_sums(W_dec, latents.columns, coefficients, latents.starts).view(n_levels, -1, d_in)
        levels[0] += b_dec - target
        squared_errors = levels.new_zeros(n_levels)
        residual = torch.empty_like(target)
        level_residuals = torch.empty_like(levels) if keep_level_residuals else None
        gradient_weights = [2 * weight / latents.batch for weight in level_weights]
        for rows in _row_blocks(latents.batch, d_in):
            blocks = [level[rows] for level in levels]
            for narrower, block in itertools.pairwise(blocks):
                block += narrower
            for index, block in enumerate(blocks):
                scaled = block if row_scale is None else block * row_scale[rows]
                squared_errors[index] += torch.linalg.vector_norm(scaled) ** 2
            residual[rows] = blocks[-1]
            if level_residuals is not None:
                level_residuals[:, rows] = levels[:, rows]
            # from here on the blocks are suffix sums, R_l in the module's docstring
            blocks[-1] *= gradient_weights[-1]
            for index in reversed(range(n_levels - 1)):
                torch.add(blocks[index + 1], blocks[index], alpha=gradient_weights[index], out=blocks[index])
        if row_scale is not None:
            levels *= row_scale.pow(2)
        squared_errors /= latents.batch
        loss = (squared_errors * squared_errors.new_tensor(level_weights)).sum()
        ctx.save_for_backward(coefficients, W_dec, levels)
        ctx.latents = latents
        ctx.mark_non_differentiable(squared_errors, residual, *([] if level_residuals is None else [level_residuals]))
        return loss, squared_errors, residual, level_residuals

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        coefficients, W_dec, suffix_sums = ctx.saved_tensors
        latents: ActiveLatents = ctx.latents
        loss_grad = grads[0]
        suffix_rows = suffix_sums.view(-1, W_dec.shape[1])
        coefficients_grad = sampled_products(suffix_rows, W_dec, latents.columns, latents.starts) * loss_grad
        order = latents.by_column
        W_dec_grad = weighted_row_sums(
            suffix_rows, latents.level_rows[order], (coefficients * loss_grad)[order], latents.column_starts
        )
        return coefficients_grad, W_dec_grad, suffix_sums[0].sum(0) * loss_grad, *[None] * 5


def _row_blocks(batch: int, d_in: int) -> Iterator[slice]:
    """Blocks of samples small enough that one level is still in the cache when the next one is added to it."""
    size = max(1, BLOCK_ELEMENTS // d_in)
    for start in range(0, batch, size):
        yield slice(start, min(start + size, batch))
