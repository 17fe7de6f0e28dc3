"""Encoder directions that go with their decoder directions (arXiv:2605.18629)."""

import torch
from jaxtyping import Float
from torch import Tensor


@torch.no_grad()
def align_encoder(W_enc: Float[Tensor, "d_in d_sae"], W_dec: Float[Tensor, "d_sae d_in"]) -> None:
    """Move every encoder direction along its decoder direction, in place, until their inner product is 1.

    An input that is ``a`` times a latent's decoder direction, and nothing else, then has the pre-activation ``a`` (bias
    aside), which is what the decoder needs to give it back. Of all changes of the encoder that do this, it is the
    smallest one.

    Args:
        W_enc: Encoder weights, fastest if their columns are contiguous.
        W_dec: Decoder weights. Directions of length 0 stay as they are.
    """
    encoder = W_enc.t()
    square = W_dec.pow(2).sum(-1)
    missing = 1 - (encoder * W_dec).sum(-1)
    encoder.addcmul_(W_dec, torch.where(square > 0, missing / square, 0.0).unsqueeze(-1))
