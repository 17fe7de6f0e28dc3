"""Training from a run file: SAELens's own runners, then a calibrated threshold and a table of the levels.

The data's way: run file -> SAELens's runner config -> SAELens's runner (model, activation store, trainer) -> saved SAEs
in their place -> thresholds calibrated on fresh activations -> figures a level. What fails after saving costs no SAE.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sae_lens import (
    BatchTopKTrainingSAE,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
    SAETrainer,
    TrainingSAE,
)
from sae_lens.constants import RUNNER_CFG_FILENAME
from sae_lens.synthetic import RUNNER_CONFIG_FILENAME, SyntheticSAERunnerConfig
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from safetensors import SafetensorError
from torch import Tensor
from typing_extensions import override

from sae_lens_matryoshka.checkpoints import find_checkpoint, sae_folders, why_not_finished
from sae_lens_matryoshka.config_files import build_runner_configs
from sae_lens_matryoshka.errors import ConfigError, UserError
from sae_lens_matryoshka.output_folders import check_apart, check_output, output_lock, staged_folder
from sae_lens_matryoshka.synthetic_runs import train_on_synthetic_model, write_scores
from sae_lens_matryoshka.trained_from import record_local_paths
from sae_lens_matryoshka.trained_saes import (
    DEFAULT_SAMPLES,
    Samples,
    SavedSAE,
    TrainedSAE,
    complete,
    is_complete,
    keep_configs_of_run,
    mark_uncalibrated,
    put_sparsity_in_order,
    read_finished,
)
from sae_lens_matryoshka.training.checkpointer import Checkpointer, CheckpointOptions
from sae_lens_matryoshka.training.data_set import open_data_set
from sae_lens_matryoshka.training.fused_adam import fuse_adam
from sae_lens_matryoshka.training.option_checks import check_samples, check_synthetic_options
from sae_lens_matryoshka.training.resumable_store import take_over_store
from sae_lens_matryoshka.training.run_folder import checkpoint_folder
from sae_lens_matryoshka.training.start_checks import check_context_size, check_d_in, check_is_text, loading_errors
from sae_lens_matryoshka.training.token_ids import check_token_ids
from sae_lens_matryoshka.training.training_on import StartingPoint, load_starting_point
from sae_lens_matryoshka.training.wandb_run import wandb_run

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """What :func:`train` leaves behind."""

    output: Path
    """The folder that holds everything."""

    saes: list[TrainedSAE] = field(default_factory=list)

    was_finished: bool = False
    """Whether the run was resumed when everything was there already, so that nothing was done."""


def train(
    run: Mapping[str, Any],
    output: str | Path | None = None,
    resume: str | Path | None = None,
    force: bool = False,
    calibration_samples: int | None = None,
    measure_samples: int | None = None,
    checkpointing: CheckpointOptions = CheckpointOptions(),  # noqa: B008 it is frozen
    trust_remote_code: bool = False,
) -> TrainResult:
    """Train what a run file asks for with SAELens's own runners.

    The output folder appears when everything is trained. It holds a saved SAE (a folder of SAEs where the run file
    names several), and gets ``levels.csv`` with the figures of every level, and for synthetic models the scores and
    their plot. Where these cannot be made, a warning and :attr:`TrainedSAE.incomplete` say how to make up for it.

    Args:
        run: A run file's contents, see :func:`config_files.read_run_file`.
        output: The folder to write; None takes the run's ``output_path``.
        resume: A checkpoint folder; ``"auto"`` for the newest complete one under the run's ``checkpoint_path`` that the
            same run has made (none: start afresh), or nothing to do if the output is there; None takes the run's
            ``resume_from_checkpoint``. New checkpoints go beside it.
        force: Whether a non-empty output folder may be replaced.
        calibration_samples: Fresh activations to calibrate BatchTopK's thresholds on; 0 keeps the running threshold,
            None takes 100,000.
        measure_samples: Fresh activations to measure the levels on; None takes 100,000.
        checkpointing: What checkpoints hold and how many are kept.
        trust_remote_code: Whether the run file may ask for code that comes with a model or data set to be run.

    Raises:
        ConfigError: If the run file cannot be used, or names a model or data set that cannot be loaded.
        UserError: If training cannot go on: a checkpoint cannot be written, a file of the data set has vanished, or
            there are numbers that are not finite. The last checkpoint is as it was.
        FileExistsError: If the output folder is not empty and ``force`` is not set.
    """
    configs = build_runner_configs(run, trust_remote_code)
    resume = run.get("resume_from_checkpoint") if resume is None else resume
    check_samples(configs, calibration_samples, measure_samples)
    samples = Samples(*(DEFAULT_SAMPLES if n is None else n for n in (calibration_samples, measure_samples)))
    output_path = _output_path(run, output)
    for cfg in configs.values() if isinstance(configs, dict) else [configs]:
        if cfg.checkpoint_path is not None:
            check_apart(output_path, Path(cfg.checkpoint_path))
    if isinstance(configs, dict):
        check_synthetic_options(run, resume, checkpointing)
        check_output(output_path, force)
    with output_lock(output_path):
        if isinstance(configs, dict):
            saved = _train_on_synthetic_model(configs, output_path, force)
        else:
            other = why_not_finished(output_path, configs, samples.calibration) if resume == "auto" else None
            if resume != "auto" or force or other:
                saved = _train_on_language_model(configs, output_path, resume, force, other, checkpointing)
            else:
                folders = sae_folders(output_path, configs)
                if all(is_complete(folder, measure_samples) for folder in folders.values()):
                    saes = [read_finished(name, folder) for name, folder in folders.items()]
                    return TrainResult(output_path, saes, was_finished=True)
                logger.info(f"The SAEs in {output_path} are trained, and are now calibrated and measured.")
                saved = _runner(configs, checkpointing).saved()
        # what has been trained is safe by now
        saes = [complete(sae, output_path, samples) for sae in saved]
        write_scores(saes, output_path)
    return TrainResult(output_path, saes)


def _train_on_synthetic_model(
    configs: dict[str, SyntheticSAERunnerConfig[Any]], output: Path, force: bool
) -> list[SavedSAE]:
    with staged_folder(output, force) as staging:
        saved = train_on_synthetic_model(configs, staging)
        _record_output_path(staging, output)
    return saved


def _train_on_language_model(
    cfg: "LanguageModelSAERunnerConfig[Any] | MultiSAETrainingRunnerConfig",
    output: Path,
    resume: str | Path | None,
    force: bool,
    other: str | None,
    checkpointing: CheckpointOptions,
) -> list[SavedSAE]:
    """Train and save; ``other`` says why what may be in the output is not what the run would write."""
    check_output(output, force, other)
    cfg.resume_from_checkpoint = None if resume is None else find_checkpoint(cfg, resume)
    start = _starting_point(cfg)
    with staged_folder(output, force) as staging, checkpoint_folder(cfg), _saving_errors(output):
        cfg.output_path = str(staging)
        runner = _runner(cfg, checkpointing, start)
        runner.run()
        _record_output_path(staging, output)
        return runner.saved()


def _output_path(run: Mapping[str, Any], output: str | Path | None) -> Path:
    if output is None and not run.get("output_path", "output"):
        raise ConfigError(f"output_path={run['output_path']!r}: train writes what it has trained; name a folder.")
    path = Path(output if output is not None else run.get("output_path", "output"))
    return path.resolve() if ".." in path.parts else path  # a folder on the way there need not exist


def _starting_point(cfg: "LanguageModelSAERunnerConfig[Any] | MultiSAETrainingRunnerConfig") -> StartingPoint | None:
    """The SAE that a run trains on from; None if it starts a new one, or goes on from a checkpoint of its own."""
    if isinstance(cfg, MultiSAETrainingRunnerConfig) or cfg.from_pretrained_path is None:
        return None
    if cfg.resume_from_checkpoint is not None:
        return None
    return load_starting_point(cfg.from_pretrained_path, cfg.sae)


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
        mark_uncalibrated(self.sae)
        record_local_paths(cfg, [self.sae])
        self.start = start
        self.checkpointing = checkpointing
        take_over_store(self, checkpointing.exact, checkpointing.max_buffer_bytes)
        check_is_text(cfg, self.activations_store)
        check_token_ids(cfg, self.model)
        check_d_in(self.activations_store, {cfg.hook_name: cfg.sae.d_in})

    @override
    def run(self) -> Any:
        with wandb_run(self.cfg):
            sae = super().run()
        put_sparsity_in_order(Path(self.cfg.output_path or ""), sae)
        return sae

    def saved(self) -> list[SavedSAE]:
        """What a run saves, with activations from where it has left off; from the start of the text before it runs."""
        calibrates = isinstance(self.sae, BatchTopKTrainingSAE)
        return [SavedSAE("sae", "", lambda: self.activations_store, self.cfg.device, calibrates)]

    @override
    def run_trainer_with_interruption_handling(self, trainer: SAETrainer[Any, Any]) -> TrainingSAE[Any]:
        fuse_adam(trainer)
        with Checkpointer(trainer, self.checkpointing, self.cfg.resume_from_checkpoint).watching():
            if self.start is not None:
                self.start.prepare(trainer)
            return trainer.fit()


class MultiSAERunner(MultiSAETrainingRunner):
    """SAELens's runner for several SAEs, with the same additions as for one."""

    def __init__(self, cfg: MultiSAETrainingRunnerConfig, checkpointing: CheckpointOptions) -> None:
        super().__init__(cfg, override_dataset=open_data_set(cfg))
        keep_configs_of_run(self.saes.values())
        record_local_paths(cfg, self.saes.values())
        for sae in self.saes.values():
            mark_uncalibrated(sae)
        self.checkpointing = checkpointing
        take_over_store(self, checkpointing.exact, checkpointing.max_buffer_bytes)
        check_token_ids(cfg, self.model)
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
            SavedSAE(name, name, partial(activations, hook_name), self.cfg.device,
                     isinstance(self.saes[name], BatchTopKTrainingSAE))
            for name, hook_name in self.cfg.hook_names_per_sae.items()
        ]  # fmt: skip

    @override
    def _run_with_interruption_handling(self, trainer: MultiSAETrainer) -> dict[str, TrainingSAE[Any]]:
        for sae_trainer in trainer.trainers.values():
            fuse_adam(sae_trainer)
        with Checkpointer(trainer, self.checkpointing, self.cfg.resume_from_checkpoint).watching():
            return trainer.fit()


def _runner(
    cfg: "LanguageModelSAERunnerConfig[Any] | MultiSAETrainingRunnerConfig",
    checkpointing: CheckpointOptions,
    start: StartingPoint | None = None,
) -> LanguageModelRunner | MultiSAERunner:
    """The runner of a config, its model and data set loaded."""
    check_context_size(cfg)
    torch.manual_seed(cfg.seed)
    with loading_errors(cfg):
        if isinstance(cfg, MultiSAETrainingRunnerConfig):
            return MultiSAERunner(cfg, checkpointing)
        return LanguageModelRunner(cfg, checkpointing, start)


def _record_output_path(staging: Path, output: Path) -> None:
    """Put the final folder in place of the temporary one in the runner configs that SAELens has written."""
    for name in (RUNNER_CFG_FILENAME, RUNNER_CONFIG_FILENAME):
        for path in staging.rglob(name):
            runner_cfg = json.loads(path.read_text(encoding="utf-8"))
            written = Path(runner_cfg["output_path"])
            runner_cfg["output_path"] = str(output / written.relative_to(staging))
            path.write_text(json.dumps(runner_cfg, indent=2), encoding="utf-8")


@contextmanager
def _saving_errors(output: Path) -> Iterator[None]:
    """Say in one sentence that the trained SAE cannot be saved; safetensors' own error is not an OSError."""
    try:
        yield
    except SafetensorError as error:
        raise UserError(
            f"The trained SAE could not be saved to {output} ({error}); make room and run again, with --resume auto "
            f"where there are checkpoints."
        ) from error
