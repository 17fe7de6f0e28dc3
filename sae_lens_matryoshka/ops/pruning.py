"""What each active latent explains that the others do not: the mathematics of leave-one-out pruning."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_matryoshka.ops.sparse import group_starts, sampled_products


def leave_one_out_gains_reference(
    target: Float[Tensor, "batch d_in"], coefficients: Float[Tensor, "batch width"], W_dec: Float[Tensor, "width d_in"]
) -> Float[Tensor, "batch width"]:
    """How far each latent's decoder direction reaches into what the other latents leave over, by definition.

    With r_i = target - sum_{j != i} a_j W_j, what is left without latent i, its gain is <r_i, W_i> / |W_i|: the length
    of the best step along its direction, in units of the target. Where it is small or negative, the others have
    explained that direction already. A direction of length 0 has gain 0.

    Args:
        target: What the latents reconstruct together, the decoder's bias already taken off.
        coefficients: What decoder rows are multiplied by.
        W_dec: The decoder rows.
    """
    residual = target - coefficients @ W_dec
    norms = W_dec.norm(dim=-1)
    directions = torch.where(norms[:, None] > 0, W_dec / norms[:, None], 0.0)
    return residual @ directions.t() + coefficients * norms


def leave_one_out_gains(
    target: Float[Tensor, "batch d_in"], coefficients: Float[Tensor, "batch width"], W_dec: Float[Tensor, "width d_in"]
) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"], Float[Tensor, " n"]]:
    """The same as :func:`leave_one_out_gains_reference` of the active latents alone, without a product over the others.

    Returns:
        Sample, latent and gain of each coefficient that is not 0.
    """
    rows, columns = coefficients.nonzero(as_tuple=True)
    # sparse products need float32 at least
    target, coefficients, W_dec = (
        t.to(torch.promote_types(t.dtype, torch.float32)) for t in (target, coefficients, W_dec)
    )
    residual = target - coefficients @ W_dec
    inner = sampled_products(residual, W_dec, columns, group_starts(rows, len(target)))
    norms = W_dec.norm(dim=-1)[columns]
    return rows, columns, torch.where(norms > 0, inner / norms, 0.0) + coefficients[rows, columns] * norms
