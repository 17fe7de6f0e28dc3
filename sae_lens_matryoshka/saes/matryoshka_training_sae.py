"""Training a Matryoshka SAE: SAELens's Matryoshka BatchTopK with level weights and an unbiased inference threshold.

Data of a step: activations -> SAELens's encoder and BatchTopK -> one reconstruction a level -> weighted sum of the
levels' squared errors plus the auxiliary loss for dead latents. Beside it the smallest selected activation feeds the
running threshold, with which the SAE is saved as a JumpReLU SAE.
"""

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor
from typing_extensions import override

from sae_lens_matryoshka.levels import validate_level_weights, validate_widths


@dataclass
class MatryoshkaTrainingSAEConfig(MatryoshkaBatchTopKTrainingSAEConfig):
    """Configuration for training a Matryoshka SAE.

    The fields are those of SAELens's ``matryoshka_batchtopk``, so a working config of it becomes ours by changing the
    architecture name. The config is checked when it is made, before any model is loaded.

    Args:
        matryoshka_widths (list[int]): The number of latents of each level, smallest level first. Copied, never edited.
            A last width below d_sae warns and adds the full level.
        level_weights (list[float] | None): The weight of each level's squared error in the loss, smallest level
            first. None counts every level once, as in SAELens and arXiv:2503.17547.
        k (float): The mean number of latents to keep active a sample. Inherited from BatchTopKTrainingSAEConfig.
        topk_threshold_lr (float): Learning rate of the running inference threshold. Inherited from
            BatchTopKTrainingSAEConfig.
        use_matryoshka_aux_loss (bool): Whether dead latents reconstruct the error of their own level rather than of
            the whole SAE. Inherited from MatryoshkaBatchTopKTrainingSAEConfig.
        aux_loss_coefficient (float): Coefficient of the auxiliary loss for dead latents. Inherited from
            TopKTrainingSAEConfig.
        rescale_acts_by_decoder_norm (bool): Select latents as if the decoder were normalized. Inherited from
            TopKTrainingSAEConfig.
        decoder_init_norm (float | None): Norm to initialize decoder rows to. Inherited from TrainingSAEConfig.
        d_in (int): Width of the activations. Inherited from SAEConfig.
        d_sae (int): Number of latents. Inherited from SAEConfig.
        dtype (str): Data type of the parameters. Inherited from SAEConfig.
        device (str): Device of the parameters. Inherited from SAEConfig.
    """

    level_weights: list[float] | None = None

    @override
    @classmethod
    def architecture(cls) -> str:
        return "matryoshka"

    def __post_init__(self) -> None:
        _validate_k(self.k, self.d_sae)
        self.matryoshka_widths = validate_widths(self.matryoshka_widths, self.d_sae)
        if self.level_weights is not None:
            self.level_weights = validate_level_weights(self.level_weights, len(self.matryoshka_widths))
        super().__post_init__()


class MatryoshkaTrainingSAE(MatryoshkaBatchTopKTrainingSAE):
    """A Matryoshka SAE in training, saved for inference as a JumpReLU SAE whose metadata hold the widths.

    Differences to SAELens's ``matryoshka_batchtopk``: level weights, figures for every level on logging steps, and a
    running threshold that is unbiased from the first step.
    """

    cfg: MatryoshkaTrainingSAEConfig  # type: ignore[assignment]
    topk_threshold_updates: Tensor

    def __init__(self, cfg: MatryoshkaTrainingSAEConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        self.register_buffer("topk_threshold_updates", torch.zeros((), dtype=torch.long, device=self.W_dec.device))

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """One training step's losses, in the same names as SAELens gives them.

        ``losses`` holds every level's mean squared error unweighted (``mse_loss`` for the full width,
        ``inner_mse_loss_<width>`` for the others), so that runs with different level weights compare; ``loss`` is
        their weighted sum plus the auxiliary loss.

        Args:
            step_input: What SAELens's trainer hands over; ``sae_in`` has shape (batch, d_in).
        """
        output = super().training_forward_pass(step_input)
        level_losses = [output.losses[_mse_loss_name(width, self.cfg.d_sae)] for width in self.cfg.matryoshka_widths]
        if self.cfg.level_weights is not None:
            # SAELens has counted every level once
            for weight, level_loss in zip(self.cfg.level_weights, level_losses, strict=True):
                output.loss = output.loss + (weight - 1) * level_loss
        if step_input.is_logging_step:
            output.metrics.update(self._level_metrics(step_input, output.feature_acts, level_losses))
        return output

    @override
    @torch.no_grad()
    def update_topk_threshold(self, acts_topk: Float[Tensor, "batch d_sae"]) -> None:
        """Move the running threshold towards the smallest selected activation of this batch.

        SAELens averages from a start value of 0, which for hundreds of steps keeps the threshold far too low. Dividing
        the average by the weight it has gathered so far, as Adam does (Kingma & Ba, arXiv:1412.6980, section 3),
        removes the start value. Written as a step towards the new value, that is a learning rate which starts at 1
        and falls to ``topk_threshold_lr``.
        """
        positive_acts = acts_topk[acts_topk > 0]
        if positive_acts.numel() == 0:
            return
        self.topk_threshold_updates = self.topk_threshold_updates + 1
        lr = self.cfg.topk_threshold_lr
        unbiased_lr = lr / (1 - (1 - lr) ** self.topk_threshold_updates.to(self.topk_threshold.dtype))
        # autocast would round the threshold to bfloat16
        with torch.autocast(self.topk_threshold.device.type, enabled=False):
            min_positive = positive_acts.min().to(self.topk_threshold.dtype)
            self.topk_threshold = self.topk_threshold + unbiased_lr * (min_positive - self.topk_threshold)

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving_inference(state_dict)
        del state_dict["topk_threshold_updates"]

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_loading(state_dict)
        # SAELens's own matryoshka_batchtopk checkpoints lack the count
        state_dict.setdefault("topk_threshold_updates", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def _level_metrics(
        self, step_input: TrainStepInput, feature_acts: Float[Tensor, "batch d_sae"], level_losses: list[Tensor]
    ) -> dict[str, Tensor]:
        """Fraction of variance unexplained, L0 and number of dead latents of each level, on this batch."""
        sae_in = step_input.sae_in.to(torch.promote_types(step_input.sae_in.dtype, torch.float32))
        total_variance = (sae_in - sae_in.mean(0)).pow(2).sum(-1).mean()
        latent_l0 = (feature_acts != 0).float().mean(0)
        metrics: dict[str, Tensor] = {}
        for width, level_loss in zip(self.cfg.matryoshka_widths, level_losses, strict=True):
            metrics[f"fvu_level_{width}"] = level_loss / total_variance
            metrics[f"l0_level_{width}"] = latent_l0[:width].sum()
            if step_input.dead_neuron_mask is not None:
                metrics[f"dead_level_{width}"] = step_input.dead_neuron_mask[:width].sum()
        return metrics


def _mse_loss_name(width: int, d_sae: int) -> str:
    """SAELens's name for the loss of the level of this width."""
    return "mse_loss" if width == d_sae else f"inner_mse_loss_{width}"


def _validate_k(k: float, d_sae: int) -> None:
    if isinstance(k, bool) or not isinstance(k, Real) or not math.isfinite(k) or k <= 0:
        raise ValueError(f"k={k!r} must be a positive number: how many latents fire on average a sample, such as 40.")
    if k > d_sae:
        raise ValueError(f"k={k} is above d_sae={d_sae}: no more latents than there are can fire; lower k.")
