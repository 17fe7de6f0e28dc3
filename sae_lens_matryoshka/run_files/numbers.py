"""Numbers of a run file with which nothing would be trained, or not what was meant, are refused by name."""

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from sae_lens_matryoshka.errors import ConfigError
from sae_lens_matryoshka.normalization import CHANNEL_STANDARDIZATION, COVARIANCE_WHITENING

_Range: TypeAlias = tuple[Callable[[float], bool], str]
"""Whether it allows a number, and what it is in words."""

_AT_LEAST_1: _Range = (lambda value: value >= 1, "at least 1")
_AT_LEAST_0: _Range = (lambda value: value >= 0, "at least 0")
_ABOVE_0: _Range = (lambda value: value > 0, "above 0")
_SHARE: _Range = (lambda value: 0 <= value <= 1, "from 0 to 1")
_BELOW_1: _Range = (lambda value: 0 <= value < 1, "from 0 to below 1, such as 0.9")

_RUN_RANGES: dict[str, _Range] = {
    **dict.fromkeys(
        (
            "training_tokens", "training_samples", "train_batch_size_tokens", "batch_size", "context_size",
            "n_batches_in_buffer", "store_batch_size_prompts", "n_batches_for_norm_estimate", "dead_feature_window",
            "feature_sampling_window", "eval_batch_size_prompts", "eval_samples", "n_eval_batches", "n_restart_cycles",
        ),
        _AT_LEAST_1,
    ),
    **dict.fromkeys(("lr_warm_up_steps", "lr_decay_steps", "n_checkpoints", "eval_frequency", "seed"), _AT_LEAST_0),
    "lr": (lambda value: value > 0, "above 0, such as 3e-4"),
    "lr_end": _AT_LEAST_0,
    "adam_beta1": _BELOW_1,
    "adam_beta2": _BELOW_1,
    "activations_mixing_fraction": _SHARE,
}  # fmt: skip
"""Fields of SAELens's runner configs."""

_LOGGER_RANGES: dict[str, _Range] = dict.fromkeys(("wandb_log_frequency", "eval_every_n_wandb_logs"), _AT_LEAST_1)

_SAE_RANGES: dict[str, _Range] = {
    **dict.fromkeys(("d_in", "d_sae"), _AT_LEAST_1),
    **dict.fromkeys(
        (
            "decoder_init_norm", "lp_norm", "jumprelu_bandwidth", "jumprelu_tanh_scale", "jumprelu_init_threshold",
            "target_l0",
        ),
        _ABOVE_0,
    ),
    **dict.fromkeys(
        (
            "l1_coefficient", "l0_coefficient", "pre_act_loss_coefficient", "aux_loss_coefficient", "l1_warm_up_steps",
            "l0_warm_up_steps",
        ),
        _AT_LEAST_0,
    ),
    "topk_threshold_lr": _SHARE,
}  # fmt: skip
"""Fields of SAELens's and our SAE configs."""

_SYNTHETIC_RANGES: dict[str, _Range] = {
    **dict.fromkeys(("num_features", "hidden_dim", "chunk_size", "rank", "total_root_nodes"), _AT_LEAST_1),
    **dict.fromkeys(("num_steps", "std_firing_magnitudes", "seed", "correlation_scale"), _AT_LEAST_0),
    **dict.fromkeys(("mean_firing_magnitudes", "lr"), _ABOVE_0),
    "probability": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
}
"""Fields of a synthetic model, those of its parts too."""

_CHOICES = {
    "lr_scheduler_name": ("constant", "cosineannealing", "cosineannealingwarmrestarts"),
    "dtype": ("float32", "float64", "bfloat16", "float16", "torch.float32", "torch.float64", "torch.bfloat16",
              "torch.float16"),
}  # fmt: skip
"""Fields that SAELens compares with some names, whatever their case."""


def check_run_numbers(values: Mapping[str, Any]) -> None:
    """Refuse numbers of a run with which nothing would be trained, or not what was meant.

    Args:
        values: All fields of SAELens's runner config; the logger a mapping or SAELens's object.

    Raises:
        ConfigError: If there is one.
    """
    _check(values, _RUN_RANGES)
    logger = values["logger"]
    logged = logger if isinstance(logger, Mapping) else getattr(logger, "__dict__", {})
    _check(logged, _LOGGER_RANGES, "logger.{}".format)
    if values["checkpoint_path"] == "":
        raise ConfigError("checkpoint_path='' is the root of all folders; name a folder, or null for no checkpoints.")
    samples, batch = _samples_and_batch(values)
    if values[samples] < values[batch]:
        raise ConfigError(
            f"{samples}={values[samples]} is less than one step of {batch}={values[batch]}: nothing would be trained; "
            f"raise the one or lower the other."
        )
    # SAELens's scheduler would begin with what comes last, where warm-up and decay take longer than the run
    _check_schedule({field: values[field] for field in ("lr_warm_up_steps", "lr_decay_steps")}, values)


def check_sae_numbers(given: Mapping[str, Any], name: Callable[[str], str]) -> None:
    """Refuse numbers of an SAE's config that would turn a loss or an initialization around.

    Args:
        given: The fields that the run file gives.
        name: What a field is called in the run file.

    Raises:
        ConfigError: If there is one.
    """
    _check(given, _SAE_RANGES, name)


def check_sae_in_run(sae: Mapping[str, Any], values: Mapping[str, Any], name: Callable[[str], str]) -> None:
    """Refuse what an SAE asks for and its run is too short, its batch too small or its runner not made for.

    Args:
        sae: The fields that the run file gives for the SAE.
        values: All fields of SAELens's runner config.
        name: What a field of the SAE is called in the run file.

    Raises:
        ConfigError: If there is one.
    """
    if "synthetic_model" in values and sae.get("normalize_activations") == CHANNEL_STANDARDIZATION:
        raise ConfigError(
            f"{name('normalize_activations')}={CHANNEL_STANDARDIZATION} is for language models: SAELens's runner on "
            f"synthetic models estimates {COVARIANCE_WHITENING} and expected_average_only_in only; set one of these."
        )
    for field in ("l1_warm_up_steps", "l0_warm_up_steps", "k_anneal_steps"):
        if sae.get(field) is not None:
            _check_schedule({name(field): sae[field]}, values)
    _, batch = _samples_and_batch(values)
    k = sae.get("k")
    if isinstance(k, float) and 0 < k * values[batch] < 1:
        raise ConfigError(
            f"{name('k')}={k!r} of {batch}={values[batch]} samples is less than one latent a batch: none would ever "
            f"fire."
        )
    if sae.get("k_start") is not None and values.get("compile_sae"):
        raise ConfigError(
            f"{name('k_start')}={sae['k_start']!r} with compile_sae=true would compile every step anew, since k is "
            f"another number each time; drop one of them."
        )


def check_synthetic_numbers(synthetic_model: Mapping[str, Any]) -> None:
    """Refuse numbers of a synthetic model that no model can have, or that SAELens would not use.

    Args:
        synthetic_model: Its fields in the run file, those of its parts as mappings.

    Raises:
        ConfigError: If there is one.
    """
    parts = {f"synthetic_model.{key}": part for key, part in synthetic_model.items() if isinstance(part, Mapping)}
    for field, values in {"synthetic_model": synthetic_model, **parts}.items():
        _check(values, _SYNTHETIC_RANGES, f"{field}.{{}}".format)
    roots = (synthetic_model.get("hierarchy") or {}).get("total_root_nodes")
    if isinstance(roots, int) and roots > synthetic_model.get("num_features", roots):
        raise ConfigError(
            f"synthetic_model.hierarchy.total_root_nodes={roots} are more than num_features="
            f"{synthetic_model['num_features']}: there would be no hierarchy."
        )


def _samples_and_batch(values: Mapping[str, Any]) -> tuple[str, str]:
    """The fields that hold how many samples a run and a batch have: tokens, of a language model."""
    if "training_tokens" in values:
        return "training_tokens", "train_batch_size_tokens"
    return "training_samples", "batch_size"


def _check_schedule(phases: Mapping[str, int], values: Mapping[str, Any]) -> None:
    samples, batch = _samples_and_batch(values)
    n_steps = values[samples] // values[batch]
    if sum(phases.values()) > n_steps:
        fields = " and ".join(f"{field}={length}" for field, length in phases.items() if length)
        raise ConfigError(
            f"{fields} take more than the {n_steps:,} steps of this run; set fewer of them, or more {samples}."
        )


def _check(values: Mapping[str, Any], ranges: Mapping[str, _Range], name: Callable[[str], str] = str) -> None:
    """Refuse numbers out of their range, and names that SAELens does not know where its config takes any text."""
    for field in ranges.keys() & values.keys():
        value, (allows, words) = values[field], ranges[field]
        if isinstance(value, int | float) and not (math.isfinite(value) and allows(value)):
            raise ConfigError(f"{name(field)}={value!r} must be {words}.")
    for field, choices in _CHOICES.items():
        value = values.get(field)
        if isinstance(value, str) and value.lower() not in choices:
            raise ConfigError(f"{name(field)}={value!r} must be one of {', '.join(choices)}.")
