"""SAELens's runners on a language model, with what this plugin adds to them, for one SAE and for several.

The data's way: data set -> SAELens's activation store, made resumable -> its trainer, with a fused optimizer and
checkpoints that are complete or absent -> the saved SAE.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sae_lens import (
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
    SAETrainer,
    TrainingSAE,
)
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from torch import Tensor
from typing_extensions import override

from sae_lens_matryoshka.devices import warn_of_slow_bfloat16
from sae_lens_matryoshka.model_folders import check_model_folder
from sae_lens_matryoshka.run_files.building import LanguageModelRunConfig
from sae_lens_matryoshka.saved.trained_from import record_local_paths
from sae_lens_matryoshka.text.data_set import open_data_set
from sae_lens_matryoshka.training.channel_scaler import prepare_normalization, warn_of_dominating_channel
from sae_lens_matryoshka.training.fused_adam import fuse_adam
from sae_lens_matryoshka.training.options import CheckpointOptions
from sae_lens_matryoshka.training.progress_bar import move_bar_every_step
from sae_lens_matryoshka.training.resuming.checkpointer import Checkpointer
from sae_lens_matryoshka.training.resuming.resumable_store import take_over_store
from sae_lens_matryoshka.training.start_checks import (
    check_context_size,
    check_d_in,
    check_is_text,
    check_token_ids,
    loading_errors,
)
from sae_lens_matryoshka.training.trained_saes import SavedSAE, prepare_configs, put_sparsity_in_order
from sae_lens_matryoshka.training.training_on import StartingPoint
from sae_lens_matryoshka.training.wandb_run import wandb_run


class LanguageModelRunner(LanguageModelSAETrainingRunner):
    """SAELens's runner with a fused optimizer, data sets and checkpoints of ours, and a wandb that never stops it."""

    def __init__(
        self,
        cfg: LanguageModelSAERunnerConfig[Any],
        checkpointing: CheckpointOptions,
        start: StartingPoint | None = None,
    ) -> None:
        sae = None if start is None else start.sae
        if sae is None and cfg.from_pretrained_path is not None:  # its weights come from the checkpoint
            sae = TrainingSAE.from_dict(cfg.get_training_sae_cfg_dict())
        super().__init__(cfg, override_dataset=open_data_set(cfg), override_sae=sae)
        prepare_configs([self.sae])
        record_local_paths(cfg, [self.sae])
        self.start = start
        self.checkpointing = checkpointing
        take_over_store(self, checkpointing.exact, checkpointing.max_buffer_bytes)
        check_is_text(cfg, self.activations_store)
        check_token_ids(cfg, self.model)
        _warn_of_slow_model(cfg, self.model)
        check_d_in(self.activations_store, {cfg.hook_name: cfg.sae.d_in})

    @override
    def run(self) -> Any:
        with wandb_run(self.cfg):
            sae = super().run()
        put_sparsity_in_order(Path(self.cfg.output_path or ""), sae)
        return sae

    def saved(self) -> list[SavedSAE]:
        """What a run saves, with activations from where it has left off; from the start of the text before it runs."""
        return [SavedSAE("sae", "", lambda: self.activations_store, self.cfg.device)]

    @override
    def run_trainer_with_interruption_handling(self, trainer: SAETrainer[Any, Any]) -> TrainingSAE[Any]:
        fuse_adam(trainer)
        move_bar_every_step(trainer)
        with Checkpointer(trainer, self.checkpointing, self.cfg.resume_from_checkpoint).watching():
            if self.start is not None:
                self.start.prepare(trainer)
            prepare_normalization(trainer, self.cfg.hook_name)
            warn_of_dominating_channel(trainer, self.cfg.hook_name)
            return trainer.fit()


class MultiSAERunner(MultiSAETrainingRunner):
    """SAELens's runner for several SAEs, with the same additions as for one."""

    def __init__(self, cfg: MultiSAETrainingRunnerConfig, checkpointing: CheckpointOptions) -> None:
        super().__init__(cfg, override_dataset=open_data_set(cfg))
        prepare_configs(self.saes.values())
        record_local_paths(cfg, self.saes.values())
        self.checkpointing = checkpointing
        take_over_store(self, checkpointing.exact, checkpointing.max_buffer_bytes)
        check_token_ids(cfg, self.model)
        _warn_of_slow_model(cfg, self.model)
        hooks = cfg.hook_names_per_sae
        check_d_in(self.activations_store, {hook: cfg.saes[name].d_in for name, hook in hooks.items()})

    @override
    def run(self) -> dict[str, TrainingSAE[Any]]:
        with wandb_run(self.cfg):
            saes = super().run()
        for name, sae in saes.items():
            put_sparsity_in_order(Path(self.cfg.output_path or "") / name, sae)
        return saes

    def saved(self) -> list[SavedSAE]:
        """What a run saves, with activations from where it has left off; from the start of the text before it runs."""

        def activations(hook_name: str) -> Iterator[Tensor]:
            return (batch[hook_name] for batch in self.activations_store.get_multi_hook_data_loader())

        return [
            SavedSAE(name, name, partial(activations, hook_name), self.cfg.device)
            for name, hook_name in self.cfg.hook_names_per_sae.items()
        ]

    @override
    def _run_with_interruption_handling(self, trainer: MultiSAETrainer) -> dict[str, TrainingSAE[Any]]:
        for sae_trainer in trainer.trainers.values():
            fuse_adam(sae_trainer)
        move_bar_every_step(trainer)
        with Checkpointer(trainer, self.checkpointing, self.cfg.resume_from_checkpoint).watching():
            prepare_normalization(trainer)
            warn_of_dominating_channel(trainer)
            return trainer.fit()


def language_model_runner(
    cfg: LanguageModelRunConfig, checkpointing: CheckpointOptions, start: StartingPoint | None = None
) -> LanguageModelRunner | MultiSAERunner:
    """The runner of a config, its model and data set loaded.

    Args:
        cfg: The config.
        checkpointing: What checkpoints hold and how many are kept.
        start: The SAE to train on from; None starts a new one.

    Raises:
        UserError: If model or data set cannot be loaded, or do not go with the config.
    """
    check_context_size(cfg)
    check_model_folder(cfg.model_name)
    torch.manual_seed(cfg.seed)
    with loading_errors(cfg):
        if isinstance(cfg, MultiSAETrainingRunnerConfig):
            return MultiSAERunner(cfg, checkpointing)
        return LanguageModelRunner(cfg, checkpointing, start)


def _warn_of_slow_model(cfg: LanguageModelRunConfig, model: Any) -> None:
    if cfg.autocast_lm:
        warn_of_slow_bfloat16(cfg.device, torch.bfloat16, "autocast_lm=false")
    else:
        parameter = next(model.parameters())
        warn_of_slow_bfloat16(parameter.device, parameter.dtype, "model_from_pretrained_kwargs.dtype=float32")
