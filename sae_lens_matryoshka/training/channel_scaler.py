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
from sae_lens_matryoshka.measuring.activation_profile import DOMINATING_SHARE
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
    trainers = {name: sae_trainer for name, sae_trainer, _ in _trainers(trainer, hook_name)}
    hooks = {name: hook for name, _, hook in _trainers(trainer, hook_name)}
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


def warn_of_dominating_channel(trainer: "SAETrainer[Any, Any] | MultiSAETrainer", hook_name: str | None = None) -> None:
    """Warn at the first step if most of the variance is one channel's and stays so: loss and latents go to it.

    Args:
        trainer: A trainer that is about to train.
        hook_name: Where a single SAE takes its activations; None for several.
    """
    for name, sae_trainer, hook in _trainers(trainer, hook_name):
        if sae_trainer.sae.cfg.normalize_activations not in (CHANNEL_STANDARDIZATION, COVARIANCE_WHITENING):
            _look_at_first_batch(sae_trainer, f"{name}: " if name else "", hook)


def _look_at_first_batch(trainer: SAETrainer[Any, Any], prefix: str, hook: str) -> None:
    step = trainer.step

    def first_step(batch: Tensor) -> Any:
        trainer.step = step
        variance = batch.double().var(0)
        share = variance.max() / variance.sum()
        if share > DOMINATING_SHARE:
            ours = isinstance(trainer.sae, NestedTrainingSAE)
            logger.warning(
                f"{prefix}channel {int(variance.argmax())} has {share:.0%} of the variance of the activations at "
                f"{hook}, so loss and latents go to it; sae.normalize_activations="
                f"{CHANNEL_STANDARDIZATION if ours else COVARIANCE_WHITENING} gives every channel as much "
                f"(sae-lens-matryoshka look-at-activations shows more)."
            )
        return step(batch)

    trainer.step = first_step


def _trainers(
    trainer: "SAETrainer[Any, Any] | MultiSAETrainer", hook_name: str | None
) -> list[tuple[str, SAETrainer[Any, Any], str]]:
    """Name, trainer and hook of every SAE; a single one has no name."""
    if isinstance(trainer, MultiSAETrainer):
        return [(name, sae_trainer, trainer.hook_names[name]) for name, sae_trainer in trainer.trainers.items()]
    return [("", trainer, hook_name or "the hook")]


def _estimate(
    trainer: "SAETrainer[Any, Any] | MultiSAETrainer", hooks: Mapping[str, str]
) -> dict[str, ActivationWhitening]:
    """The whitening of each hook, estimated from the next batches; ``hooks`` are those of the SAEs that want one."""
    statistics = {hook: RunningChannelStatistics() for hook in hooks.values()}
    for _ in tqdm(range(trainer.cfg.n_batches_for_norm_estimate), "Estimating channels", leave=False):
        batch: Any = next(trainer.data_provider)
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
