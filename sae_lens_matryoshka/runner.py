"""Training from a run file: SAELens's own runners, then a calibrated threshold and a table of the levels.

The data's way: run file -> SAELens's runner config -> SAELens's runner (model, activation store, trainer) ->
calibration on fresh activations -> saved folder -> :class:`MatryoshkaSAE` read back from it -> figures a level.
"""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
    SAETrainer,
    TrainingSAE,
    logger,
)
from sae_lens.constants import RUNNER_CFG_FILENAME, SPARSITY_FILENAME
from sae_lens.synthetic import RUNNER_CONFIG_FILENAME, SyntheticModel, SyntheticSAERunner, SyntheticSAERunnerConfig
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from typing_extensions import override

from sae_lens_matryoshka.calibration import ThresholdCalibration, calibrate_threshold
from sae_lens_matryoshka.checkpoints import find_checkpoint
from sae_lens_matryoshka.config_files import build_runner_configs
from sae_lens_matryoshka.errors import UserError
from sae_lens_matryoshka.level_metrics import LevelMetrics, measure_levels
from sae_lens_matryoshka.output_folders import check_output, staged_folder
from sae_lens_matryoshka.saes.matryoshka_sae import MatryoshkaSAE, recorded_widths
from sae_lens_matryoshka.saes.matryoshka_sae_kinds import KINDS
from sae_lens_matryoshka.saes.nested_training_sae import NestedTrainingSAE
from sae_lens_matryoshka.synthetic_benchmark import SyntheticScores, plot_scores, score_on_synthetic_model
from sae_lens_matryoshka.training.checkpointer import Checkpointer, CheckpointOptions
from sae_lens_matryoshka.training.data_set import open_data_set
from sae_lens_matryoshka.training.fused_adam import fuse_adam
from sae_lens_matryoshka.training.resumable_store import take_over_store
from sae_lens_matryoshka.training.run_folder import checkpoint_folder
from sae_lens_matryoshka.training.start_checks import check_d_in, loading_errors
from sae_lens_matryoshka.training.wandb_run import start_wandb

LEVELS_FILENAME = "levels.csv"
SCORES_FILENAME = "scores.csv"
SCORES_FIGURE_FILENAME = "scores.png"


@dataclass(frozen=True)
class TrainedSAE:
    """One SAE that a run has trained and saved."""

    name: str
    """Its name in the run file; ``sae`` where there is only one."""

    path: Path
    """The folder it was saved to."""

    calibration: ThresholdCalibration | None
    """What the calibration changed; None for architectures that need none."""

    levels: list[LevelMetrics]
    """Figures of the saved SAE, a level each; empty for architectures without levels."""

    scores: SyntheticScores | None = None
    """How well the features of the synthetic model were found; None for language models."""


@dataclass(frozen=True)
class TrainResult:
    """What :func:`train` leaves behind."""

    output: Path
    """The folder that holds everything."""

    saes: list[TrainedSAE] = field(default_factory=list)


def train(
    run: Mapping[str, Any],
    output: str | Path | None = None,
    resume: str | Path | None = None,
    force: bool = False,
    calibration_samples: int = 100_000,
    measure_samples: int = 100_000,
    checkpointing: CheckpointOptions = CheckpointOptions(),  # noqa: B008 it is frozen
) -> TrainResult:
    """Train what a run file asks for with SAELens's own runners.

    The output folder appears when everything is done. It holds a saved SAE (a folder of SAEs where the run file names
    several), ``levels.csv`` with the figures of every level, and for synthetic models the scores and their plot.

    Args:
        run: A run file's contents, see :func:`config_files.read_run_file`.
        output: The folder to write; None takes the run's ``output_path``.
        resume: A checkpoint folder, ``"auto"`` for the newest complete one under the run's ``checkpoint_path`` that
            was made with the same settings (none: start afresh), or None to start afresh. New checkpoints go beside it.
        force: Whether a non-empty output folder may be replaced.
        calibration_samples: Fresh activations to calibrate thresholds on; 0 keeps the running threshold.
        measure_samples: Fresh activations to measure the levels on.
        checkpointing: What checkpoints hold and how many are kept.

    Raises:
        ConfigError: If the run file cannot be used, or names a model or data set that cannot be loaded.
        UserError: If training cannot go on: a checkpoint cannot be written, a file of the data set has vanished, or
            there are numbers that are not finite. The last checkpoint is as it was.
        FileExistsError: If the output folder is not empty and ``force`` is not set.
    """
    run = dict(run)
    output_path = Path(output if output is not None else run.get("output_path") or "output")
    check_output(output_path, force)
    if resume is not None:
        run["resume_from_checkpoint"] = find_checkpoint(run, resume)
    configs = build_runner_configs(run)
    with staged_folder(output_path, force) as staging:
        if isinstance(configs, dict):
            saes = _train_on_synthetic_model(configs, staging, calibration_samples, measure_samples)
        else:
            samples = (calibration_samples, measure_samples)
            with checkpoint_folder(configs, run.get("checkpoint_path")), _saving_errors(output_path):
                if isinstance(configs, MultiSAETrainingRunnerConfig):
                    saes = _train_several(configs, staging, *samples, checkpointing)
                else:
                    saes = [_train_one(configs, staging, *samples, checkpointing)]
        _record_output_path(staging, output_path)
    return TrainResult(output_path, [replace(sae, path=output_path / sae.path.relative_to(staging)) for sae in saes])


class CalibratingLanguageModelRunner(LanguageModelSAETrainingRunner):
    """SAELens's runner with a fused optimizer, checkpoints to resume from, and calibration after training."""

    calibration: ThresholdCalibration | None = None

    def __init__(
        self, cfg: LanguageModelSAERunnerConfig[Any], calibration_samples: int, checkpointing: CheckpointOptions
    ) -> None:
        super().__init__(cfg, override_dataset=open_data_set(cfg))
        self.calibration_samples = calibration_samples
        self.checkpointing = checkpointing
        take_over_store(self, checkpointing.exact, checkpointing.max_buffer_bytes)

    @override
    def run(self) -> Any:
        start_wandb(self.cfg)
        return super().run()

    @override
    def run_trainer_with_interruption_handling(self, trainer: SAETrainer[Any, Any]) -> TrainingSAE[Any]:
        fuse_adam(trainer)
        with Checkpointer(trainer, self.checkpointing, self.cfg.resume_from_checkpoint).watching():
            sae = trainer.fit()
        self.calibration = _calibrate(sae, trainer.data_provider, self.calibration_samples)
        return sae


class CalibratingMultiSAERunner(MultiSAETrainingRunner):
    """SAELens's runner for several SAEs, with the same additions as for one."""

    def __init__(
        self, cfg: MultiSAETrainingRunnerConfig, calibration_samples: int, checkpointing: CheckpointOptions
    ) -> None:
        super().__init__(cfg, override_dataset=open_data_set(cfg))
        self.calibration_samples = calibration_samples
        self.checkpointing = checkpointing
        self.calibrations: dict[str, ThresholdCalibration | None] = {}
        take_over_store(self, checkpointing.exact, checkpointing.max_buffer_bytes)

    @override
    def run(self) -> dict[str, TrainingSAE[Any]]:
        start_wandb(self.cfg)
        return super().run()

    @override
    def _run_with_interruption_handling(self, trainer: MultiSAETrainer) -> dict[str, TrainingSAE[Any]]:
        for sae_trainer in trainer.trainers.values():
            fuse_adam(sae_trainer)
        with Checkpointer(trainer, self.checkpointing, self.cfg.resume_from_checkpoint).watching():
            saes = trainer.fit()
        for name, sae in saes.items():
            activations = (batch[trainer.hook_names[name]] for batch in trainer.data_provider)
            self.calibrations[name] = _calibrate(sae, activations, self.calibration_samples)
        return saes


def _train_one(
    cfg: LanguageModelSAERunnerConfig[Any],
    staging: Path,
    calibration_samples: int,
    measure_samples: int,
    checkpointing: CheckpointOptions,
) -> TrainedSAE:
    cfg.output_path = str(staging)
    torch.manual_seed(cfg.seed)
    with loading_errors(cfg):
        runner = CalibratingLanguageModelRunner(cfg, calibration_samples, checkpointing)
    check_d_in(runner.activations_store, {cfg.hook_name: cfg.sae.d_in})
    _put_sparsity_in_order(staging, runner.run())
    levels = _measure_saved(staging, runner.activations_store, measure_samples, cfg.device)
    return TrainedSAE("sae", staging, runner.calibration, levels)


def _train_several(
    cfg: MultiSAETrainingRunnerConfig,
    staging: Path,
    calibration_samples: int,
    measure_samples: int,
    checkpointing: CheckpointOptions,
) -> list[TrainedSAE]:
    cfg.output_path = str(staging)
    torch.manual_seed(cfg.seed)
    with loading_errors(cfg):
        runner = CalibratingMultiSAERunner(cfg, calibration_samples, checkpointing)
    check_d_in(runner.activations_store, {hook: cfg.saes[name].d_in for name, hook in cfg.hook_names_per_sae.items()})
    saes = runner.run()
    trained: list[TrainedSAE] = []
    for name, hook_name in cfg.hook_names_per_sae.items():
        _put_sparsity_in_order(staging / name, saes[name])
        activations = (batch[hook_name] for batch in runner.activations_store.get_multi_hook_data_loader())
        levels = _measure_saved(staging / name, activations, measure_samples, cfg.device)
        trained.append(TrainedSAE(name, staging / name, runner.calibrations[name], levels))
    return trained


def _train_on_synthetic_model(
    configs: dict[str, SyntheticSAERunnerConfig[Any]], staging: Path, calibration_samples: int, measure_samples: int
) -> list[TrainedSAE]:
    first = next(iter(configs.values()))
    synthetic_model = SyntheticModel.load_from_source(first.synthetic_model, device=first.device)
    trained: list[TrainedSAE] = []
    for name, cfg in configs.items():
        path = staging / name if len(configs) > 1 else staging
        cfg.output_path = str(path)
        # every SAE starts from the same seed and sees the same samples
        torch.manual_seed(synthetic_model.cfg.seed or 0)
        logger.info(f"Training {name} on the synthetic model")
        sae = SyntheticSAERunner(cfg, override_synthetic_model=synthetic_model).run().sae
        calibration = _calibrate(sae, _samples(synthetic_model, cfg.batch_size), calibration_samples)
        sae.save_inference_model(path)  # again, now with the calibrated threshold
        _put_sparsity_in_order(path, sae)
        levels = _measure_saved(path, _samples(synthetic_model, cfg.batch_size), measure_samples, cfg.device)
        scores = score_on_synthetic_model(
            SAE.load_from_disk(path, device=cfg.device), synthetic_model, cfg.eval_samples
        )
        trained.append(TrainedSAE(name, path, calibration, levels, scores))
    scores_by_name = {sae.name: sae.scores for sae in trained if sae.scores is not None}
    _write_csv(staging / SCORES_FILENAME, [{"sae": name, **asdict(s)} for name, s in scores_by_name.items()])
    plot_scores(scores_by_name, staging / SCORES_FIGURE_FILENAME)
    return trained


def _samples(synthetic_model: SyntheticModel, batch_size: int) -> Iterator[Tensor]:
    while True:
        yield synthetic_model.sample(batch_size)


def _calibrate(
    sae: TrainingSAE[Any], activations: Iterable[Tensor], calibration_samples: int
) -> ThresholdCalibration | None:
    if calibration_samples == 0 or not isinstance(sae, BatchTopKTrainingSAE):
        return None
    return calibrate_threshold(sae, activations, calibration_samples)


def _measure_saved(path: Path, activations: Iterable[Tensor], n_samples: int, device: str) -> list[LevelMetrics]:
    """Measure what was saved, read back as a user would, and write the figures beside it."""
    sae = SAE.load_from_disk(path, device=device)
    if sae.cfg.architecture() not in KINDS:
        return []
    widths = recorded_widths(sae.cfg.to_dict()) or [sae.cfg.d_sae]
    levels = measure_levels(MatryoshkaSAE.from_sae(sae, widths), activations, n_samples)
    _write_csv(path / LEVELS_FILENAME, [asdict(level) for level in levels])
    return levels


def _put_sparsity_in_order(path: Path, sae: TrainingSAE[Any]) -> None:
    """SAELens saves its statistics in the order of training; a saved SAE's latents may have been put in another."""
    order = sae.latent_order if isinstance(sae, NestedTrainingSAE) else None
    if order is not None:
        sparsity = {name: values[order.cpu()] for name, values in load_file(path / SPARSITY_FILENAME).items()}
        save_file(sparsity, path / SPARSITY_FILENAME)


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


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
