"""Options of a run that its kind would not use are refused by name, before anything is loaded."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from sae_lens import BatchTopKTrainingSAEConfig
from sae_lens.synthetic import SyntheticSAERunnerConfig

from sae_lens_matryoshka.errors import ConfigError
from sae_lens_matryoshka.levels import SAVED_AS
from sae_lens_matryoshka.run_files.building import RunnerConfigs, sae_configs
from sae_lens_matryoshka.training.options import CheckpointOptions, check_sample_numbers


def check_samples(configs: RunnerConfigs, calibration_samples: int | None, measure_samples: int | None) -> None:
    """Refuse numbers of samples that cannot be, or that are for SAEs of another kind than the run's.

    Args:
        configs: The run's configs.
        calibration_samples: How many samples to calibrate thresholds on; None if the user has not said.
        measure_samples: How many samples to measure levels on; None if the user has not said.

    Raises:
        ConfigError: If one of them is too small, or is positive and no SAE of the run would use it.
    """
    check_sample_numbers(calibration_samples, measure_samples)
    runs = configs.values() if isinstance(configs, dict) else [configs]
    saes = [sae for cfg in runs for sae in sae_configs(cfg).values()]
    names = ", ".join(sorted({sae.architecture() for sae in saes}))
    if calibration_samples and not any(isinstance(sae, BatchTopKTrainingSAEConfig) for sae in saes):
        raise ConfigError(
            f"--calibration-samples {calibration_samples} is for the running threshold of BatchTopK, which {names} has "
            f"none of; leave it out."
        )
    if measure_samples and not any(sae.get_inference_config_class().architecture() in SAVED_AS for sae in saes):
        raise ConfigError(
            f"--measure-samples {measure_samples} is for SAEs saved as {', '.join(SAVED_AS)}, which {names} is "
            f"not; leave it out."
        )


def check_synthetic_options(
    configs: Mapping[str, SyntheticSAERunnerConfig[Any]],
    resume: str | Path | None,
    options: CheckpointOptions,
    sample_pool: int | None = None,
) -> None:
    """Refuse what a run on a synthetic model does not use.

    Args:
        configs: The run's configs.
        resume: The checkpoint to resume from, if any.
        options: What checkpoints hold and how many are kept.
        sample_pool: How many samples to draw once, if any.

    Raises:
        ConfigError: If one of them is given, or the pool does not go with the run.
    """
    if resume is not None:
        raise ConfigError(
            "A run on a synthetic model cannot be resumed: SAELens's SyntheticSAERunner has no such option."
        )
    flags = {"exact": "--no-exact-resume", "max_buffer_bytes": "--max-buffer-gb", "keep": "--keep-checkpoints"}
    if given := [flags[f.name] for f in fields(options) if getattr(options, f.name) != f.default]:
        raise ConfigError(
            f"{', '.join(given)} cannot be used on a synthetic model, whose checkpoints are SAELens's, and all are "
            f"kept; leave it out."
        )
    first = next(iter(configs.values()))
    if sample_pool is not None:
        _check_sample_pool(sample_pool, first)
    wandb_id = first.logger.wandb_id
    if len(configs) > 1 and wandb_id is not None:
        raise ConfigError(
            f"logger.wandb_id={wandb_id!r} is one id, but each of saes is a wandb run of its own on a synthetic "
            f"model. --unset logger.wandb_id takes it out of the run file."
        )


def _check_sample_pool(n_samples: int, cfg: SyntheticSAERunnerConfig[Any]) -> None:
    if isinstance(n_samples, bool) or not isinstance(n_samples, int) or n_samples < cfg.batch_size:
        raise ConfigError(f"--sample-pool {n_samples} must be at least one batch, batch_size={cfg.batch_size}.")
    if cfg.run_final_eval or cfg.eval_frequency > 0:
        field = "run_final_eval=true" if cfg.run_final_eval else f"eval_frequency={cfg.eval_frequency}"
        fix = "run_final_eval=false" if cfg.run_final_eval else "eval_frequency=0"
        raise ConfigError(
            f"{field} evaluates on the runner's own samples, which with --sample-pool are training's; set {fix}: the "
            f"saved SAEs are scored on fresh ones."
        )
    if cfg.save_synthetic_model:
        raise ConfigError(
            "save_synthetic_model=true cannot be used with --sample-pool; set save_synthetic_model=false."
        )
