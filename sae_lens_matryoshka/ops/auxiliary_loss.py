"""The auxiliary loss that brings dead latents back, on the dead columns only.

Dead latents are made to reconstruct what the living ones leave over: for each sample the ``d_in // 2`` of them with the
largest scores, at most all of them (Gao et al., arXiv:2406.04093, appendix A.2, without its normalization by variance).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding

from sae_lens_matryoshka.ops.encoder import hidden_pre_of


def auxiliary_loss(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    W_dec: Float[Tensor, "d_sae d_in"],
    b_dec: Float[Tensor, " d_in"] | None,
    residual: Float[Tensor, "batch d_in"],
    dead: Int[Tensor, " n_dead"],
    column_scale: Float[Tensor, " d_sae"] | None,
    row_scale: Float[Tensor, "batch 1"] | None,
) -> Float[Tensor, ""]:
    """Mean squared error of the dead latents' reconstruction of ``residual``, scaled down where few are dead.

    Equals SAELens's ``calculate_topk_aux_loss`` before its coefficient. The sum of those of all levels, each of its own
    dead latents and its residual, equals ``calculate_matryoshka_aux_loss``.

    Args:
        x: The input of the encoder, ``b_dec`` already subtracted; gets no gradient itself.
        W_enc: Encoder weights.
        b_enc: Encoder bias.
        W_dec: Decoder weights.
        b_dec: The decoder bias if it was subtracted from the input, else None.
        residual: What the living latents leave over, target minus reconstruction; gets no gradient.
        dead: Indices of the dead latents.
        column_scale: What pre-activations are multiplied by to choose among the dead; None for 1.
        row_scale: What the errors of each sample are multiplied by before squaring; None for 1.
    """
    n_dead = dead.numel()
    if n_dead == 0:
        return x.new_zeros(())
    k_aux = x.shape[-1] // 2
    hidden_pre = hidden_pre_of(x, W_enc, b_enc, b_dec, dead)
    if n_dead > k_aux:
        scores = hidden_pre.detach() if column_scale is None else hidden_pre.detach() * column_scale[dead]
        chosen = torch.zeros_like(hidden_pre).scatter_(1, scores.topk(k_aux, sorted=False).indices, 1.0)
        hidden_pre = hidden_pre * chosen
    # a sparse gradient: autograd adds the dead rows to the gradient that W_dec has from the nested loss
    error = hidden_pre @ embedding(dead, W_dec, sparse=True) - residual.detach()
    if row_scale is not None:
        error = error * row_scale
    return min(n_dead / k_aux, 1.0) * error.pow(2).sum(-1).mean()
