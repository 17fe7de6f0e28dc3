"""What a training SAE does about normalizations by statistics of each sample, which SAELens undoes after decoding."""

from typing import Any

import torch
from jaxtyping import Float
from sae_lens import TrainingSAE
from torch import Tensor
from typing_extensions import override

SAMPLE_NORMALIZATIONS = ("layer_norm", "constant_norm_rescale")
"""The values of ``normalize_activations`` that are of this kind."""

_SAMPLE_STATISTICS = ("ln_mu", "ln_std", "x_norm_coeff")


class NormalizesSamples(TrainingSAE[Any]):
    """Lets every level undo a sample's normalization, and weighs errors as if it had."""

    @override
    def _setup_activation_normalization(self) -> None:
        """Undo a sample's normalization as often as there are levels.

        SAELens deletes the statistics as it undoes the normalization for the first time, so that its Matryoshka class
        fails on its first step with ``layer_norm`` and ``constant_norm_rescale``.
        """
        super()._setup_activation_normalization()
        undo_once = self.run_time_activation_norm_fn_out

        def undo(x: Tensor) -> Tensor:
            statistics = {name: getattr(self, name) for name in _SAMPLE_STATISTICS if hasattr(self, name)}
            undone = undo_once(x)
            for name, value in statistics.items():
                setattr(self, name, value)
            return undone

        if self.cfg.normalize_activations in SAMPLE_NORMALIZATIONS:
            self.run_time_activation_norm_fn_out = undo

    def _target_before_normalization_is_undone(
        self, sae_in: Float[Tensor, "batch d_in"]
    ) -> tuple[Float[Tensor, "batch d_in"], Float[Tensor, "batch 1"] | None]:
        """What the decoder must produce so that undoing the normalization gives ``sae_in``.

        Undoing it multiplies by the row scale (the second value, None for 1) and adds a mean, so an error of the
        decoder counts row scale times in the loss.
        """
        sae_in = sae_in.to(self.dtype)
        if self.cfg.normalize_activations == "layer_norm":
            centred = sae_in - sae_in.mean(dim=-1, keepdim=True)
            row_scale = centred.std(dim=-1, keepdim=True)
            return torch.where(row_scale > 0, centred / row_scale, 0.0), row_scale
        if self.cfg.normalize_activations == "constant_norm_rescale":
            row_scale = sae_in.norm(dim=-1, keepdim=True) / sae_in.shape[-1] ** 0.5
            return sae_in / row_scale, row_scale
        return sae_in, None
