"""What a training SAE does about activations that are standardized or whitened before they reach it."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from sae_lens import TrainingSAE
from torch import Tensor
from typing_extensions import override

from sae_lens_matryoshka.normalization import CHANNEL_STANDARDIZATION, COVARIANCE_WHITENING


def channels_that_vary(
    mean: Float[Tensor, " d_in"], standard_deviation: Float[Tensor, " d_in"]
) -> Bool[Tensor, " d_in"]:
    """Which channels vary by more than float32 rounds their mean.

    Args:
        mean: Of each channel.
        standard_deviation: Of each channel.
    """
    return standard_deviation > torch.finfo(torch.float32).eps * mean.abs()


class TakesStandardizedChannels(TrainingSAE[Any]):
    """Refuses to train on raw activations what asks for standardized ones, and folds either whitening in closely."""

    gets_standardized_channels: bool = False
    """Whether the trainer standardizes its input as ``normalize_activations`` may ask; SAELens's own does not."""

    def check_is_standardized(self) -> None:
        """Refuse a step without the normalization that the config asks for.

        Raises:
            ValueError: If the trainer does not know ``channel_standardization``.
        """
        if self.cfg.normalize_activations == CHANNEL_STANDARDIZATION and not self.gets_standardized_channels:
            raise ValueError(
                f"normalize_activations={CHANNEL_STANDARDIZATION!r} is applied by sae_lens_matryoshka.train and "
                f"`sae-lens-matryoshka train`; SAELens's own runners would train on the activations as they are: use "
                f"one of the former, or normalize_activations={COVARIANCE_WHITENING!r}."
            )

    @override
    @torch.no_grad()
    def fold_activation_whitening(
        self,
        mean: Float[Tensor, " d_in"],
        whitening_matrix: Float[Tensor, "d_in d_in"],
        unwhitening_matrix: Float[Tensor, "d_in d_in"],
    ) -> None:
        """As in SAELens, and then the encoder bias makes up for the rounding of all else.

        The mean activation gets the pre-activations that it got in training. Without that they would be shifted where
        a channel's mean is thousands and parameters are bfloat16, which has a number every 32 there.
        """
        mean64 = mean.to(self.device, torch.float64)
        expected = self._hidden_pre(torch.zeros_like(mean64))
        if getattr(self.cfg, "rescale_acts_by_decoder_norm", False):  # SAELens folds the norms in too
            expected *= self.W_dec.to(torch.float64).norm(dim=-1)
        super().fold_activation_whitening(mean, whitening_matrix, unwhitening_matrix)
        b_enc: Any = self.b_enc
        b_enc.data.copy_(b_enc.to(torch.float64) + expected - self._hidden_pre(mean64))

    def _hidden_pre(self, x: Float[Tensor, " d_in"]) -> Float[Tensor, " d_sae"]:
        """Pre-activations in float64, whatever the parameters are rounded to."""
        centred = x - self.b_dec.to(x) if self.cfg.apply_b_dec_to_input else x
        b_enc: Any = self.b_enc
        return centred @ self.W_enc.to(x) + b_enc.to(x)
