"""Numbers of a run file with which nothing would be trained, or not what was meant, are refused by name."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from sae_lens_matryoshka.errors import ConfigError

_COUNTS = frozenset((
    "training_tokens", "training_samples", "train_batch_size_tokens", "batch_size", "context_size",
    "n_batches_in_buffer", "store_batch_size_prompts", "n_batches_for_norm_estimate", "lr_warm_up_steps",
    "lr_decay_steps", "n_checkpoints", "dead_feature_window", "feature_sampling_window", "eval_batch_size_prompts",
    "eval_samples", "seed",
))  # fmt: skip
"""Fields of SAELens's runner configs that count something."""

_MAY_BE_ZERO = ("lr_warm_up_steps", "lr_decay_steps", "n_checkpoints", "seed")

_ABOVE_ZERO = ("decoder_init_norm", "lp_norm", "jumprelu_bandwidth", "jumprelu_tanh_scale", "target_l0")
_AT_LEAST_ZERO = (
    "l1_coefficient", "l0_coefficient", "pre_act_loss_coefficient", "aux_loss_coefficient", "l1_warm_up_steps",
    "l0_warm_up_steps", "jumprelu_init_threshold", "topk_threshold_lr",
)  # fmt: skip
"""Fields of SAELens's and our SAE configs."""


def check_run_numbers(values: Mapping[str, Any]) -> None:
    """Refuse numbers of a run with which nothing would be trained, or not what was meant.

    Args:
        values: All fields of SAELens's runner config.

    Raises:
        ConfigError: If there is one.
    """
    for field in _COUNTS & values.keys():
        least = 0 if field in _MAY_BE_ZERO else 1
        if isinstance(values[field], int) and values[field] < least:
            raise ConfigError(f"{field}={values[field]!r} must be at least {least}.")
    n_samples, batch_size = (
        ("training_tokens", "train_batch_size_tokens")
        if "training_tokens" in values
        else ("training_samples", "batch_size")
    )
    n_steps = values[n_samples] // values[batch_size]
    if n_steps == 0:
        raise ConfigError(
            f"{n_samples}={values[n_samples]} is less than one step of {batch_size}={values[batch_size]}: nothing "
            f"would be trained; raise the one or lower the other."
        )
    _check_schedule({field: values[field] for field in ("lr_warm_up_steps", "lr_decay_steps")}, n_steps, n_samples)
    between = {
        "lr": (lambda value: value > 0, "above 0, such as 3e-4"),
        "lr_end": (lambda value: value >= 0, "0 or above"),
        "adam_beta1": (lambda value: 0 <= value < 1, "from 0 to below 1, such as 0.9"),
        "adam_beta2": (lambda value: 0 <= value < 1, "from 0 to below 1, such as 0.999"),
    }
    for field, (is_allowed, range_and_example) in between.items():
        _check(field, values.get(field), is_allowed, range_and_example)


def check_sae_numbers(given: Mapping[str, Any], name: Callable[[str], str]) -> None:
    """Refuse numbers of an SAE's config that would turn a loss or an initialization around.

    Args:
        given: The fields that the run file gives.
        name: What a field is called in the run file.

    Raises:
        ConfigError: If there is one.
    """
    for field in _ABOVE_ZERO:
        _check(name(field), given.get(field), lambda value: value > 0, "above 0")
    for field in _AT_LEAST_ZERO:
        _check(name(field), given.get(field), lambda value: value >= 0, "0 or above")


def _check_schedule(phases: Mapping[str, int], n_steps: int, n_samples: str) -> None:
    """SAELens's scheduler would begin with what comes last, where warm-up and decay take longer than the run."""
    if sum(phases.values()) > n_steps:
        fields = " and ".join(f"{field}={length}" for field, length in phases.items() if length)
        raise ConfigError(
            f"{fields} take more than the {n_steps:,} steps of this run; set fewer of them, or more {n_samples}."
        )


def _check(field: str, value: float | None, is_allowed: Callable[[float], bool], allowed: str) -> None:
    if value is not None and not (math.isfinite(value) and is_allowed(value)):
        raise ConfigError(f"{field}={value!r} must be {allowed}.")
