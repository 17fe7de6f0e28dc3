"""Pre-activations of selected or of all latents, with a gradient for the parameters and none for the input.

SAELens subtracts ``b_dec`` from the input, so that autograd would send a gradient back through a whole batch x d_sae
product for the sake of one vector. The functions here give ``b_dec`` its gradient without that product.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_matryoshka.ops.latents import ActiveLatents
from sae_lens_matryoshka.ops.sparse import weighted_row_sums


def selected_hidden_pre(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    b_dec: Float[Tensor, " d_in"] | None,
    latents: ActiveLatents,
) -> Float[Tensor, " n"]:
    """``latents.hidden_pre`` as a function of the parameters, for autograd.

    With g the gradient of an entry (b, i): dW_enc[:, i] = sum_b g x_b, db_enc[i] = sum_b g, and where ``b_dec`` has
    been subtracted from the input, db_dec = -W_enc db_enc. The input itself gets no gradient.

    Args:
        x: The input of the encoder, ``b_dec`` already subtracted.
        W_enc: Encoder weights.
        b_enc: Encoder bias.
        b_dec: The decoder bias if it was subtracted from the input, else None.
        latents: The active latents.
    """
    return _SelectedHiddenPre.apply(x.detach(), W_enc, b_enc, b_dec, latents)  # type: ignore[no-any-return]


def hidden_pre_of(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    b_dec: Float[Tensor, " d_in"] | None,
    latent_ids: Int[Tensor, " n"] | None = None,
) -> Float[Tensor, "batch n"]:
    """The pre-activations of some latents (None: of all) as a dense matrix: ``x @ W_enc + b_enc``.

    ``b_dec`` has already been subtracted from ``x``, or is None.
    """
    if latent_ids is not None:
        # rows of the transposed encoder are contiguous where training keeps it column by column
        W_enc, b_enc = W_enc.t().index_select(0, latent_ids).t(), b_enc.index_select(0, latent_ids)
    if b_dec is not None:
        b_enc = b_enc - (b_dec - b_dec.detach()) @ W_enc.detach()  # subtracts 0
    return x.detach() @ W_enc + b_enc


class _SelectedHiddenPre(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None, latents: ActiveLatents
    ) -> Tensor:
        ctx.save_for_backward(x, W_enc)
        ctx.latents = latents
        ctx.has_b_dec = b_dec is not None
        return latents.hidden_pre.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc = ctx.saved_tensors
        latents: ActiveLatents = ctx.latents
        grad = grads[0]
        order = latents.by_column
        W_enc_grad = weighted_row_sums(x, latents.rows[order], grad[order], latents.column_starts).t()
        b_enc_grad = grad.new_zeros(W_enc.shape[1]).index_add_(0, latents.columns, grad)
        b_dec_grad = -(W_enc @ b_enc_grad) if ctx.has_b_dec else None
        return None, W_enc_grad, b_enc_grad, b_dec_grad, None
