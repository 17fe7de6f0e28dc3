"""The nested reconstruction losses of a Matryoshka SAE and their exact gradient, in one pass over the non-zeros.

With residuals r_l = b_dec + sum_{i < w_l} a_i W_i - x of level l, the loss is sum_l c_l mean_b |r_l|^2. Level l adds
its own latents to level l - 1, so running sums give all residuals. A latent i of level l(i) enters the residuals of
that level and all larger ones, so with the suffix sums R_l = (2 / batch) sum_{m >= l} c_m r_m

    dL/da_bi = <W_i, R_l(i)[b]>      dL/dW_i = sum_b a_bi R_l(i)[b]      dL/db_dec = sum_b R_1[b]

Any number of levels costs the three passes over the non-zeros that one costs (loss: arXiv:2503.17547, section 3).
"""

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

    squared_errors: Float[Tensor, " n_levels"]
    """Each level's squared error, summed over dimensions and averaged over samples. Carries the gradient."""

    residuals: Float[Tensor, "n_levels batch d_in"]
    """Each level's reconstruction minus the target. Without gradient."""


def nested_errors_reference(
    coefficients: Float[Tensor, "batch d_sae"],
    W_dec: Float[Tensor, "d_sae d_in"],
    b_dec: Float[Tensor, " d_in"],
    target: Float[Tensor, "batch d_in"],
    widths: list[int],
    row_scale: Float[Tensor, "batch 1"] | None = None,
) -> NestedErrors:
    """The errors of all levels by their definition, a dense product a level.

    Args:
        coefficients: What each latent's decoder row is multiplied by, for each sample.
        W_dec: Decoder weights.
        b_dec: Decoder bias.
        target: What to reconstruct.
        widths: The level widths, smallest first.
        row_scale: What the residuals of each sample are multiplied by before squaring; None for 1.
    """
    residuals = torch.stack([coefficients[:, :width] @ W_dec[:width] + b_dec - target for width in widths])
    scaled = residuals if row_scale is None else residuals * row_scale
    return NestedErrors(scaled.pow(2).sum(-1).mean(-1), residuals.detach())


def nested_errors(
    coefficients: Float[Tensor, " n"],
    W_dec: Float[Tensor, "d_sae d_in"],
    b_dec: Float[Tensor, " d_in"],
    target: Float[Tensor, "batch d_in"],
    latents: ActiveLatents,
    row_scale: Float[Tensor, "batch 1"] | None = None,
) -> NestedErrors:
    """The same as :func:`nested_errors_reference`, from the non-zeros only.

    Args:
        coefficients: What the decoder row of each active latent is multiplied by, in the order of ``latents``.
        W_dec: Decoder weights.
        b_dec: Decoder bias.
        target: What to reconstruct; gets no gradient.
        latents: The active latents.
        row_scale: What the residuals of each sample are multiplied by before squaring; None for 1.
    """
    return NestedErrors(*_NestedErrors.apply(coefficients, W_dec, b_dec, target, latents, row_scale))  # type: ignore[misc]


class _NestedErrors(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        coefficients: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        target: Tensor,
        latents: ActiveLatents,
        row_scale: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        n_levels, d_in = len(latents.widths), W_dec.shape[1]
        residuals = weighted_row_sums(W_dec, latents.columns, coefficients, latents.starts).view(n_levels, -1, d_in)
        squared_errors = residuals.new_zeros(n_levels)
        residuals[0] += b_dec - target
        for rows in _row_blocks(latents.batch, d_in):
            for level in range(n_levels):
                block = residuals[level, rows]
                if level > 0:
                    block += residuals[level - 1, rows]
                scaled = block if row_scale is None else block * row_scale[rows]
                squared_errors[level] += torch.linalg.vector_norm(scaled) ** 2
        squared_errors /= latents.batch
        ctx.save_for_backward(coefficients, W_dec, residuals, row_scale)
        ctx.latents = latents
        ctx.mark_non_differentiable(residuals)
        return squared_errors, residuals

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        coefficients, W_dec, residuals, row_scale = ctx.saved_tensors
        latents: ActiveLatents = ctx.latents
        level_grads = (grads[0] * (2 / latents.batch)).tolist()
        suffix_sums = torch.empty_like(residuals)
        last = residuals.shape[0] - 1
        for rows in _row_blocks(latents.batch, residuals.shape[2]):
            torch.mul(residuals[last, rows], level_grads[last], out=suffix_sums[last, rows])
            for level in reversed(range(last)):
                wider = suffix_sums[level + 1, rows]
                torch.add(wider, residuals[level, rows], alpha=level_grads[level], out=suffix_sums[level, rows])
        if row_scale is not None:
            suffix_sums *= row_scale.pow(2)
        suffix_rows = suffix_sums.view(-1, W_dec.shape[1])
        coefficients_grad = sampled_products(suffix_rows, W_dec, latents.columns, latents.starts)
        order = latents.by_column
        W_dec_grad = weighted_row_sums(
            suffix_rows, latents.level_rows[order], coefficients[order], latents.column_starts
        )
        return coefficients_grad, W_dec_grad, suffix_sums[0].sum(0), None, None, None


def _row_blocks(batch: int, d_in: int) -> Iterator[slice]:
    """Blocks of samples small enough that one level is still in the cache when the next one is added to it."""
    size = max(1, BLOCK_ELEMENTS // d_in)
    for start in range(0, batch, size):
        yield slice(start, min(start + size, batch))
