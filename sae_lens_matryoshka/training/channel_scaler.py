"""``normalize_activations: channel_standardization`` in SAELens's trainers, which estimate only their own words for it.

The statistics are SAELens's ``ActivationWhitening`` with diagonal matrices. So checkpoints hold them in SAELens's file,
its evaluations scale and unscale by them, and at the end of training it folds them into the weights.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAETrainer
from sae_lens.constants import ACTIVATION_WHITENING_FILENAME
from sae_lens.training.activation_scaler import ActivationScaler, ActivationWhitening
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from torch import Tensor
from tqdm.auto import tqdm
from typing_extensions import override

from sae_lens_matryoshka.errors import UserError
from sae_lens_matryoshka.measuring.channel_statistics import ChannelStatistics, RunningChannelStatistics
from sae_lens_matryoshka.normalization import CHANNEL_STANDARDIZATION, COVARIANCE_WHITENING
from sae_lens_matryoshka.saes.nested_training_sae import NestedTrainingSAE
from sae_lens_matryoshka.saes.standardized_channels import channels_that_vary

logger = logging.getLogger(__name__)


@dataclass
class ChannelScaler(ActivationScaler):
    """SAELens's scaler for a whitening whose matrices are diagonal, channel by channel and in float32 at least."""

    @override
    def scale(self, acts: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        if self.whitening is None:  # folded into the weights
            return acts
        self.whitening = whitening = self.whitening.to(acts.device)
        exact = acts.to(torch.promote_types(acts.dtype, torch.float32))
        scaled = (exact - whitening.mean.to(exact.dtype)) * whitening.matrix.diagonal().to(exact.dtype)
        return scaled.to(acts.dtype)

    @override
    def unscale(self, acts: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        if self.whitening is None:
            return acts
        self.whitening = whitening = self.whitening.to(acts.device)
        exact = acts.to(torch.promote_types(acts.dtype, torch.float32))
        unscaled = exact * whitening.inverse_matrix.diagonal().to(exact.dtype) + whitening.mean.to(exact.dtype)
        return unscaled.to(acts.dtype)


def prepare_normalization(trainer: "SAETrainer[Any, Any] | MultiSAETrainer", hook_name: str | None = None) -> None:
    """Standardize the channels of what SAEs are trained on, where their configs ask for it.

    Statistics are estimated from the next ``n_batches_for_norm_estimate`` batches, the same ones for all SAEs, unless
    a checkpoint has brought them along.

    Args:
        trainer: A trainer that is about to train; a state to resume from has been loaded.
        hook_name: Where a single SAE takes its activations; None for several.

    Raises:
        UserError: If a checkpoint lacks the statistics that its weights were trained with, or they cannot be estimated:
            a channel never varies, or activations are not finite.
    """
    if isinstance(trainer, MultiSAETrainer):
        trainers, hooks = trainer.trainers, trainer.hook_names
    else:
        trainers, hooks = {"": trainer}, {"": hook_name or "the hook"}
    standardized = [name for name, t in trainers.items() if t.sae.cfg.normalize_activations == CHANNEL_STANDARDIZATION]
    whitened = [name for name, t in trainers.items() if t.sae.cfg.normalize_activations == COVARIANCE_WHITENING]
    for name in (*standardized, *whitened):
        if trainer.n_training_samples > 0 and trainers[name].activation_scaler.whitening is None:
            raise UserError(
                f"{ACTIVATION_WHITENING_FILENAME} is missing from the checkpoint, by which activations were normalized "
                f"for its weights; resume from another one"
            )
    to_estimate = [name for name in standardized if trainers[name].activation_scaler.whitening is None]
    whitenings: dict[str, ActivationWhitening] = {}
    if to_estimate:
        whitenings = _estimate(trainer, {name: hooks[name] for name in to_estimate})
    for name in standardized:
        sae: Any = trainers[name].sae
        assert isinstance(sae, NestedTrainingSAE)
        sae.gets_standardized_channels = True
        known = trainers[name].activation_scaler.whitening
        trainers[name].activation_scaler = ChannelScaler(whitening=known or whitenings[hooks[name]])


def _estimate(
    trainer: "SAETrainer[Any, Any] | MultiSAETrainer", hooks: Mapping[str, str]
) -> dict[str, ActivationWhitening]:
    """The whitening of each hook, estimated from the next batches; ``hooks`` are those of the SAEs that want one."""
    statistics = {hook: RunningChannelStatistics() for hook in hooks.values()}
    for _ in tqdm(range(trainer.cfg.n_batches_for_norm_estimate), "Estimating channels", leave=False):
        batch = next(trainer.data_provider)
        for hook, running in statistics.items():
            try:
                running.add(batch[hook] if isinstance(trainer, MultiSAETrainer) else batch)
            except ValueError as error:
                raise UserError(f"The activations at {hook} cannot be standardized: {error}") from error
    return {hook: _whitening(running.result(), hook) for hook, running in statistics.items()}


def _whitening(statistics: ChannelStatistics, hook: str) -> ActivationWhitening:
    """SAELens's whitening with diagonal matrices.

    Args:
        statistics: What the channels are like.
        hook: Where.

    Raises:
        UserError: If a channel does not vary by more than its rounding errors.
    """
    mean, standard_deviation, n_samples, n_left_out = statistics
    if still := (~channels_that_vary(mean, standard_deviation)).nonzero().flatten().tolist():
        others = f" and {len(still) - 1} more" if len(still) > 1 else ""
        raise UserError(
            f"Channel {still[0]}{others} of {hook} never varies (always {mean[still[0]]:.4g}), so it cannot be divided "
            f"by its standard deviation; set sae.normalize_activations={COVARIANCE_WHITENING}, which can leave it as "
            f"it is"
        )
    logger.info(
        f"Channels of {hook} standardized by {n_samples:,} activations; {n_left_out:,} more, far from the rest, were "
        f"left out."
    )
    return ActivationWhitening(mean, (1 / standard_deviation).diag(), standard_deviation.diag())
