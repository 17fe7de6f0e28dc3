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
    configs: Mapping[str, SyntheticSAERunnerConfig[Any]], resume: str | Path | None, options: CheckpointOptions
) -> None:
    """Refuse what a run on a synthetic model does not use.

    Args:
        configs: The run's configs.
        resume: The checkpoint to resume from, if any.
        options: What checkpoints hold and how many are kept.

    Raises:
        ConfigError: If one of them is given.
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
    wandb_id = next(iter(configs.values())).logger.wandb_id
    if len(configs) > 1 and wandb_id is not None:
        raise ConfigError(
            f"logger.wandb_id={wandb_id!r} is one id, but each of saes is a wandb run of its own on a synthetic "
            f"model. --unset logger.wandb_id takes it out of the run file."
        )
