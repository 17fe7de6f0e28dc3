"""From a checked run file to SAELens's own config objects, which check the rest."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig, MultiSAETrainingRunnerConfig, TrainingSAEConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.synthetic import SyntheticModelConfig, SyntheticSAERunnerConfig, ZipfianFiringProbabilityConfig

from sae_lens_matryoshka.devices import resolve_device
from sae_lens_matryoshka.errors import ConfigError
from sae_lens_matryoshka.run_files.checking import CheckedRun, check_language_model_run, check_run_file
from sae_lens_matryoshka.run_files.numbers import check_run_numbers, check_sae_in_run, check_sae_numbers

LanguageModelRunConfig: TypeAlias = LanguageModelSAERunnerConfig[Any] | MultiSAETrainingRunnerConfig
RunnerConfig: TypeAlias = LanguageModelRunConfig | SyntheticSAERunnerConfig[Any]
RunnerConfigs: TypeAlias = LanguageModelRunConfig | dict[str, SyntheticSAERunnerConfig[Any]]

_DEVICES = frozenset(("device", "llm_device", "act_store_device"))


def sae_configs(cfg: RunnerConfig) -> Mapping[str, TrainingSAEConfig]:
    """The configs of a run's SAEs by name; a single one is called ``sae``."""
    return cfg.saes if isinstance(cfg, MultiSAETrainingRunnerConfig) else {"sae": cfg.sae}


def build_runner_configs(run: Mapping[str, Any], trust_remote_code: bool = False) -> RunnerConfigs:
    """Turn a run file's contents into the config of the SAELens runner it is meant for; see :func:`check_run_file`.

    Args:
        run: The run file's contents.
        trust_remote_code: Whether the run file may ask for code of a model or data set to be run.

    Returns:
        The config; for a run on a synthetic model one for each SAE, by name.

    Raises:
        ConfigError: If the run file cannot be used, or SAELens refuses a value.
    """
    checked = check_run_file(run, trust_remote_code)
    saes = {}
    for name, sae in checked.saes.items():
        with _config_errors(sae.field):
            saes[name] = SAE_TRAINING_CLASS_REGISTRY[sae.architecture][1](**sae.values)
    values = dict(checked.values)
    if "logger" in values:
        with _config_errors("logger"):
            values["logger"] = LoggingConfig(**values["logger"])
    _resolve_devices(values)
    if checked.config == "SyntheticSAERunnerConfig":
        return _build_synthetic(checked, values, saes)
    with _config_errors(checked.config):
        if checked.config == "MultiSAETrainingRunnerConfig":
            cfg: LanguageModelRunConfig = MultiSAETrainingRunnerConfig(**values, saes=saes)
        else:
            cfg = LanguageModelSAERunnerConfig(**values, sae=saes["sae"])
    _anneal_k_over_the_run(cfg)
    return cfg


def check_runner_config(cfg: RunnerConfig) -> None:
    """Check a config that was made with SAELens alone as a run file is checked, and settle its devices.

    Args:
        cfg: The config; ``device="auto"`` becomes the device that it stands for.

    Raises:
        ConfigError: If a number cannot be what was meant, or a device is not there.
        TypeError: If it is none of SAELens's runner configs.
    """
    if not isinstance(cfg, LanguageModelSAERunnerConfig | MultiSAETrainingRunnerConfig | SyntheticSAERunnerConfig):
        raise TypeError(
            f"train takes a run file's contents or a config of SAELens's runners, not {type(cfg).__name__}."
        )
    values = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg)}
    check_run_numbers(values)
    for name, sae in sae_configs(cfg).items():
        check_sae_numbers(vars(sae), f"{name}.{{}}".format)
        check_sae_in_run(vars(sae), values, f"{name}.{{}}".format)
    if not isinstance(cfg, SyntheticSAERunnerConfig):
        check_language_model_run(values)
    _resolve_devices(values)
    for field in _DEVICES & values.keys():
        setattr(cfg, field, values[field])
    _anneal_k_over_the_run(cfg)


def _anneal_k_over_the_run(cfg: RunnerConfig) -> None:
    """Let k fall over the whole run where a config says from where and not how long: it does not know its run."""
    if isinstance(cfg, SyntheticSAERunnerConfig):
        n_steps = cfg.training_samples // cfg.batch_size
    else:
        n_steps = cfg.training_tokens // cfg.train_batch_size_tokens
    for sae in sae_configs(cfg).values():
        if getattr(sae, "k_start", None) is not None and getattr(sae, "k_anneal_steps", 0) is None:
            vars(sae)["k_anneal_steps"] = n_steps


def check_synthetic_d_in(field: str, d_in: int, hidden_dim: int) -> None:
    """Refuse an SAE that is not as wide as the synthetic model's activations; SAELens would make it so.

    Args:
        field: Where the SAE stands in the run file.
        d_in: Its width.
        hidden_dim: The model's.

    Raises:
        ConfigError: If they differ.
    """
    if d_in != hidden_dim:
        raise ConfigError(
            f"{field}.d_in={d_in}, but the synthetic model's activations are {hidden_dim} wide; set {field}.d_in="
            f"{hidden_dim}."
        )


def _build_synthetic(
    checked: CheckedRun, values: dict[str, Any], saes: Mapping[str, Any]
) -> dict[str, SyntheticSAERunnerConfig[Any]]:
    if isinstance(values["synthetic_model"], dict):
        defaults = {"firing_probability": ZipfianFiringProbabilityConfig().to_dict()}
        with _config_errors("synthetic_model"):
            values["synthetic_model"] = SyntheticModelConfig.from_dict({**defaults, **values["synthetic_model"]})
    configs: dict[str, SyntheticSAERunnerConfig[Any]] = {}
    for name, sae in saes.items():
        with _config_errors(checked.config):
            configs[name] = SyntheticSAERunnerConfig(**values, sae=sae)
        _anneal_k_over_the_run(configs[name])
        if isinstance(values["synthetic_model"], SyntheticModelConfig):
            check_synthetic_d_in(checked.saes[name].field, sae.d_in, values["synthetic_model"].hidden_dim)
    return configs


@contextmanager
def _config_errors(field: str) -> Iterator[None]:
    """Turn what a SAELens config raises into a ConfigError that says where it was."""
    try:
        yield
    except ConfigError:
        raise
    except (TypeError, ValueError, KeyError) as error:
        message = re.sub(r"^\w+\.__init__\(\) ", "", str(error))
        raise ConfigError(f"{field}: {message}") from error


def _resolve_devices(values: dict[str, Any]) -> None:
    for field in _DEVICES & values.keys():
        device = values[field]
        if isinstance(device, str) and (field, device) != ("act_store_device", "with_model"):
            values[field] = resolve_device(device, field)
