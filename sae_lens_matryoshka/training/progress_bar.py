"""SAELens's training bar, moved at every step: it moves every hundredth, so that short and slow runs stand at 0 %."""

import time
from functools import partial
from itertools import islice
from typing import Any

from sae_lens import SAETrainer
from sae_lens.saes.sae import TrainStepOutput
from sae_lens.training.multi_sae_trainer import MultiSAETrainer

SECONDS_BETWEEN_LOSSES = 2.0
"""Losses are shown so often; reading them waits for the device."""


def move_bar_every_step(trainer: SAETrainer[Any, Any] | MultiSAETrainer) -> None:
    """Have a trainer's bar count tokens at every step, with their rate since the start of the run and the time left.

    Args:
        trainer: A trainer that has not begun to fit.
    """
    move_bar: Any = partial(_update_bar, trainer, _LossesShown())
    trainer._update_pbar = move_bar  # SAELens has no other way in


class _LossesShown:
    """When losses were last shown."""

    at: float | None = None


def _update_bar(
    trainer: SAETrainer[Any, Any] | MultiSAETrainer, losses: _LossesShown, output: Any, bar: Any, *_: Any
) -> None:
    """In place of SAELens's ``_update_pbar``: ``output`` is a step's, or a mapping of them by SAE."""
    now = time.monotonic()
    if losses.at is None:
        bar.unit, bar.unit_scale = " tokens", True
        bar.smoothing = 0  # steps come in bursts, whenever the buffer is full: only the mean rate says when it ends
        bar.n = bar.initial = trainer.n_training_samples - trainer.cfg.train_batch_size_samples
    if losses.at is None or now - losses.at >= SECONDS_BETWEEN_LOSSES:
        losses.at = now
        bar.set_description_str(f"{trainer.n_training_steps}| {_shown(output)}", refresh=False)
    bar.update(trainer.n_training_samples - bar.n)


def _shown(output: Any) -> str:
    """The loss, or that of the first SAEs: all that SAELens shows would push rate and time left out of a terminal."""
    if isinstance(output, TrainStepOutput):
        return f"loss: {output.loss.item():.5g}"
    losses = [f"{name}: {step.loss.item():.5g}" for name, step in islice(output.items(), 2)]
    return " | ".join([*losses, *(["..."] if len(output) > 2 else [])])
