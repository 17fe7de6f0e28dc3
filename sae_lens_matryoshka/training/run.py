"""Training from a run file or a config: SAELens's own runners, then a calibrated threshold and a table of the levels.

The data's way: run file -> SAELens's runner config -> SAELens's runner (model, activation store, trainer) -> saved SAEs
in their place -> thresholds calibrated on fresh activations -> figures a level. What fails after saving costs no SAE.
"""

import copy
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_lens import LanguageModelSAERunnerConfig
from sae_lens.constants import RUNNER_CFG_FILENAME
from sae_lens.synthetic import RUNNER_CONFIG_FILENAME, SyntheticSAERunnerConfig
from safetensors import SafetensorError

from sae_lens_matryoshka.activation_cache.cache import ActivationCache
from sae_lens_matryoshka.activation_cache.made_from import check_outside_sources
from sae_lens_matryoshka.errors import ConfigError, UserError
from sae_lens_matryoshka.run_files.building import (
    LanguageModelRunConfig,
    RunnerConfig,
    RunnerConfigs,
    build_runner_configs,
    check_runner_config,
)
from sae_lens_matryoshka.saved.level_figures import read_level_figures
from sae_lens_matryoshka.training.cached_activations import (
    cached_runner,
    held_out_samples,
    open_activations,
    read_from,
)
from sae_lens_matryoshka.training.language_model import LanguageModelRunner, MultiSAERunner, language_model_runner
from sae_lens_matryoshka.training.option_checks import check_samples, check_synthetic_options
from sae_lens_matryoshka.training.options import CheckpointOptions
from sae_lens_matryoshka.training.output_folders import (
    SCORES_FIGURE_FILENAME,
    SCORES_FILENAME,
    check_apart,
    check_output,
    output_folder,
    output_lock,
    staged_folder,
)
from sae_lens_matryoshka.training.resuming.checkpoints import find_checkpoint, sae_folders, why_not_finished
from sae_lens_matryoshka.training.resuming.run_folder import checkpoint_folder
from sae_lens_matryoshka.training.synthetic_model import train_on_synthetic_model, write_scores
from sae_lens_matryoshka.training.trained_saes import (
    DEFAULT_SAMPLES,
    Samples,
    SavedSAE,
    TrainedSAE,
    complete,
    is_complete,
)
from sae_lens_matryoshka.training.training_on import StartingPoint, load_starting_point

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """What :func:`train` leaves behind."""

    output: Path
    """The folder that holds everything."""

    saes: list[TrainedSAE]

    was_finished: bool = False
    """Whether the run was resumed when everything was there already, so that nothing was done."""


def train(
    run: Mapping[str, Any] | RunnerConfig,
    output: str | Path | None = None,
    resume: str | Path | None = None,
    force: bool = False,
    calibration_samples: int | None = None,
    measure_samples: int | None = None,
    checkpointing: CheckpointOptions = CheckpointOptions(),  # noqa: B008 it is frozen
    trust_remote_code: bool = False,
    activations: str | Path | None = None,
    sample_pool: int | None = None,
) -> TrainResult:
    """Train with SAELens's own runners, then calibrate and measure what has been trained.

    The output folder appears when everything is trained. It holds a saved SAE (a folder of SAEs where the run has
    several), and gets ``levels.csv`` with the figures of every level, and for synthetic models the scores and their
    plot. Where these cannot be made, a warning and :attr:`TrainedSAE.incomplete` say how to make up for it.

    Args:
        run: A config of one of SAELens's runners, or a run file's contents (:func:`read_run_file`).
        output: The folder to write; None takes the run's ``output_path``.
        resume: A checkpoint folder; ``"auto"`` for the newest complete one under the run's ``checkpoint_path`` that the
            same run has made (none: start afresh), or nothing to do if the output is there; None takes the run's
            ``resume_from_checkpoint``. New checkpoints go beside it.
        force: Whether a non-empty output folder may be replaced.
        calibration_samples: Fresh activations to calibrate BatchTopK's thresholds on; 0 keeps the running threshold,
            None takes 100,000.
        measure_samples: Fresh activations to measure the levels on; None takes 100,000.
        checkpointing: What checkpoints hold and how many are kept.
        trust_remote_code: Whether code that comes with a data set may be run (SAELens's own default), and whether a run
            file may ask for that of a model.
        activations: The folder of an activation cache to train from, without a language model
            (:func:`~sae_lens_matryoshka.cache_activations` makes one). Thresholds are calibrated and levels measured
            on what it holds out, at most ``calibration_samples`` and ``measure_samples`` of it.
        sample_pool: How many samples of a synthetic model to draw once, for all SAEs and epochs; None draws every batch
            afresh. Calibration, figures and scores are of fresh samples either way.

    Raises:
        ConfigError: If the run cannot be used, or names a model or data set that cannot be loaded.
        UserError: If training cannot go on: a checkpoint cannot be written, a file of the data set has vanished, or
            there are numbers that are not finite. The last checkpoint is as it was.
        FileExistsError: If the output folder is not empty and ``force`` is not set.
    """
    configs = runner_configs(run, trust_remote_code)
    if activations is not None:
        if isinstance(configs, dict):
            raise ConfigError("--activations is for runs on a language model; a synthetic one needs no cache.")
        configs = read_from(configs, activations)
    check_samples(configs, calibration_samples, measure_samples)
    samples = Samples(*(DEFAULT_SAMPLES if n is None else n for n in (calibration_samples, measure_samples)))
    first, *others = configs.values() if isinstance(configs, dict) else [configs]
    output_path = _output_path(first.output_path if output is None else output)
    for cfg in (first, *others):
        if cfg.checkpoint_path is not None:
            check_apart(output_path, Path(cfg.checkpoint_path))
    if isinstance(configs, dict):
        check_synthetic_options(configs, resume, checkpointing, sample_pool)
        check_output(output_path, force)
        with output_lock(output_path):
            with staged_folder(output_path, force, (SCORES_FILENAME, SCORES_FIGURE_FILENAME)) as staging:
                saved = train_on_synthetic_model(configs, staging, sample_pool)
                _record_output_path(staging, output_path)
            return _finish(saved, output_path, samples)
    if sample_pool is not None:
        raise ConfigError("--sample-pool is for runs on a synthetic model; --activations shares a language model's.")
    check_outside_sources(output_path, configs)
    if configs.checkpoint_path is not None:
        check_outside_sources(Path(configs.checkpoint_path), configs, "checkpoint_path")
    cache = open_activations(configs, checkpointing)
    if cache is not None:
        samples = held_out_samples(cache, calibration_samples, measure_samples)
    with output_lock(output_path):
        resume = configs.resume_from_checkpoint if resume is None else resume
        other = why_not_finished(output_path, configs, samples.calibration) if resume == "auto" else None
        if resume != "auto" or force or other:
            saved = _train_on_language_model(configs, output_path, resume, force, other, checkpointing, cache)
            return _finish(saved, output_path, samples)
        folders = sae_folders(output_path, configs)
        if all(is_complete(folder, measure_samples) for folder in folders.values()):
            finished = [TrainedSAE(name, path, None, read_level_figures(path)) for name, path in folders.items()]
            return TrainResult(output_path, finished, was_finished=True)
        logger.info(f"The SAEs in {output_path} are trained, and are now calibrated and measured.")
        return _finish(_runner(configs, checkpointing, None, cache).saved(), output_path, samples)


def runner_configs(run: Mapping[str, Any] | RunnerConfig, trust_remote_code: bool) -> RunnerConfigs:
    """The configs of a run; SAELens's own objects are copied, since training sets fields of them."""
    if isinstance(run, Mapping):
        return build_runner_configs(run, trust_remote_code)
    configs = copy.deepcopy(run)
    check_runner_config(configs)
    if not isinstance(configs, SyntheticSAERunnerConfig) and not trust_remote_code:
        configs.dataset_trust_remote_code = False
    return {"sae": configs} if isinstance(configs, SyntheticSAERunnerConfig) else configs


def _finish(saved: list[SavedSAE], output: Path, samples: Samples) -> TrainResult:
    """Calibrate and measure; what has been trained is safe by now."""
    saes = [complete(sae, output, samples) for sae in saved]
    write_scores(saes, output)
    return TrainResult(output, saes)


def _train_on_language_model(
    cfg: LanguageModelRunConfig,
    output: Path,
    resume: str | Path | None,
    force: bool,
    other: str | None,
    checkpointing: CheckpointOptions,
    cache: ActivationCache | None,
) -> list[SavedSAE]:
    """Train and save; ``other`` says why what may be in the output is not what the run would write."""
    check_output(output, force, other)
    cfg.resume_from_checkpoint = None if resume is None else find_checkpoint(cfg, resume)
    start = None
    if (
        isinstance(cfg, LanguageModelSAERunnerConfig)
        and cfg.from_pretrained_path is not None
        and cfg.resume_from_checkpoint is None
    ):
        start = load_starting_point(cfg.from_pretrained_path, cfg.sae)
    with staged_folder(output, force) as staging, checkpoint_folder(cfg):
        cfg.output_path = str(staging)
        runner = _runner(cfg, checkpointing, start, cache)
        try:
            runner.run()
        except SafetensorError as error:  # which is not an OSError
            raise UserError(
                f"The trained SAE could not be saved to {output} ({error}); make room and run again, with --resume "
                f"auto where there are checkpoints."
            ) from error
        _record_output_path(staging, output)
        return runner.saved()


def _runner(
    cfg: LanguageModelRunConfig,
    checkpointing: CheckpointOptions,
    start: StartingPoint | None,
    cache: ActivationCache | None,
) -> LanguageModelRunner | MultiSAERunner:
    """The runner of a run on a language model or on what is cached of one."""
    if cache is None:
        return language_model_runner(cfg, checkpointing, start)
    return cached_runner(cfg, checkpointing, start, cache)


def _output_path(output: str | Path | None) -> Path:
    if not output:
        raise ConfigError(f"output_path={output!r}: train writes what it has trained; name a folder.")
    return output_folder(output)


def _record_output_path(staging: Path, output: Path) -> None:
    """Put the final folder in place of the temporary one in the runner configs that SAELens has written."""
    for name in (RUNNER_CFG_FILENAME, RUNNER_CONFIG_FILENAME):
        for path in staging.rglob(name):
            runner_cfg = json.loads(path.read_text(encoding="utf-8"))
            runner_cfg["output_path"] = str(output / Path(runner_cfg["output_path"]).relative_to(staging))
            path.write_text(json.dumps(runner_cfg, indent=2), encoding="utf-8")
