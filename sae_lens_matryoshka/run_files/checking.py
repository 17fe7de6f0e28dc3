"""What can be told of a run file without SAELens: keys, types, numbers, and values that nothing would use.

The data's way: a run file's contents -> :func:`check_run_file` -> :class:`CheckedRun`, the fields of SAELens's configs
with values of the types that these want, from which :mod:`run_files.building` makes the objects.
"""

import copy
import difflib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

from sae_lens_matryoshka.errors import ConfigError
from sae_lens_matryoshka.normalization import CHANNEL_STANDARDIZATION, COVARIANCE_WHITENING
from sae_lens_matryoshka.replaced_fields import REPLACED_FIELDS
from sae_lens_matryoshka.run_files.numbers import (
    check_run_numbers,
    check_sae_in_run,
    check_sae_numbers,
    check_synthetic_numbers,
)
from sae_lens_matryoshka.run_files.saes import SAEFields, named_saes, why_no_folder
from sae_lens_matryoshka.saelens_fields import OBJECT, REQUIRED, Fields, Nested, tables

NEVER_READ = ("dead_feature_threshold", "log_activations_store_to_wandb", "log_optimizer_state_to_wandb", "hook_eval")
"""Fields of SAELens's configs that nothing in SAELens reads."""

READ_ONLY_WITH: dict[str, tuple[str, tuple[str, ...]]] = {
    "lr_end": ("lr_scheduler_name", ("cosineannealing", "cosineannealingwarmrestarts")),
    "n_restart_cycles": ("lr_scheduler_name", ("cosineannealingwarmrestarts",)),
    "cached_activations_path": ("use_cached_activations", ("true",)),
    "target_l0": ("jumprelu_sparsity_loss_mode", ("quadratic",)),
    "jumprelu_tanh_scale": ("jumprelu_sparsity_loss_mode", ("tanh",)),
    "llm_compilation_mode": ("compile_llm", ("true",)),
    "sae_compilation_mode": ("compile_sae", ("true",)),
}
"""Fields that change what is trained or how, but only if another field has one of the values given here."""


_PATHS = frozenset((
    "model_name", "dataset_path", "output_path", "checkpoint_path", "from_pretrained_path", "cached_activations_path",
    "resume_from_checkpoint", "synthetic_model",
))  # fmt: skip
"""Fields that can name a path, where a ``~`` at its beginning is the home folder."""


ONE_LEVEL_TWINS = {
    "batchtopk": "matryoshka",
    "matryoshka_batchtopk": "matryoshka",
    "topk": "matryoshka_topk",
    "jumprelu": "matryoshka_jumprelu",
    "standard": "matryoshka_standard",
}
"""What trains the same as an architecture of SAELens's, with one level or with the same ones, and takes our options."""


class CheckedSAE(NamedTuple):
    """An SAE of a run file, checked."""

    field: str
    """Where it stands in the run file."""

    architecture: str

    values: dict[str, Any]
    """The fields of the architecture's config."""


class CheckedRun(NamedTuple):
    """A run file's contents, checked."""

    config: str
    """The name of SAELens's runner config that it is meant for."""

    values: dict[str, Any]
    """The fields of that config, without its SAEs."""

    saes: dict[str, CheckedSAE]
    """Its SAEs, by name; a single one is called ``sae``."""


def check_run_file(run: Mapping[str, Any], trust_remote_code: bool = False) -> CheckedRun:
    """Check what can be checked without SAELens and a model.

    ``synthetic_model`` selects the ``SyntheticSAERunner``, one run for each SAE on the same synthetic model; otherwise
    ``saes`` selects the ``MultiSAETrainingRunner`` and ``sae`` the ``LanguageModelSAETrainingRunner``. A ``sae`` beside
    ``saes`` gives its fields to every entry that has none of its own.

    Args:
        run: The run file's contents.
        trust_remote_code: Whether the run file may ask for code of a model or data set to be run.

    Raises:
        ConfigError: If a key is unknown (the nearest valid one is named) or would not be used, a value has the wrong
            type, an SAE's name cannot be a folder, or a number cannot be what was meant.
    """
    if not trust_remote_code:
        _check_trusted(run)
    sae_fields = named_saes(run)
    _check_training_on(run, sae_fields)
    saes = {name: _check_sae(fields, f"saes.{name}" if "saes" in run else "sae") for name, fields in sae_fields.items()}
    values = copy.deepcopy({key: value for key, value in run.items() if key not in ("sae", "saes")})
    config = "MultiSAETrainingRunnerConfig" if "saes" in run else "LanguageModelSAERunnerConfig"
    if "synthetic_model" in run:
        config = "SyntheticSAERunnerConfig"
    for key in ("hook_names", "hook_head_indices"):  # names of SAEs from Python may be numbers, as in a file
        if isinstance(values.get(key), Mapping):
            values[key] = {str(name): value for name, value in values[key].items()}
    _check_config(values, config)
    synthetic_model, logger = values.get("synthetic_model", ""), values.get("logger", {})
    if isinstance(synthetic_model, dict):
        _check_config(synthetic_model, "SyntheticModelConfig", "synthetic_model.{}".format)
        check_synthetic_numbers(synthetic_model)
    elif not isinstance(synthetic_model, str):
        raise ConfigError(f"synthetic_model={synthetic_model!r} must be a mapping, a path or a Hub repository.")
    if not isinstance(logger, dict):
        raise ConfigError(f"logger={logger!r} must be a mapping of LoggingConfig fields.")
    _check_config(logger, "LoggingConfig", "logger.{}".format)
    for field in _PATHS & values.keys():
        if isinstance(values[field], str) and values[field].startswith("~"):
            values[field] = str(Path(values[field]).expanduser())
    everything = {name: field.default for name, field in tables().configs[config].items()} | values
    check_run_numbers(everything)
    for sae in saes.values():
        check_sae_in_run(sae.values, everything, f"{sae.field}.{{}}".format)
    if config != "SyntheticSAERunnerConfig":
        check_language_model_run(everything)
        if everything["use_chat_formatting"]:
            values.setdefault("is_dataset_tokenized", False)  # SAELens's default, true, does not go with chats
        values.setdefault("dataset_trust_remote_code", False)  # SAELens's default is to run what comes with a data set
    return CheckedRun(config, values, saes)


def check_language_model_run(values: Mapping[str, Any]) -> None:
    """Catch what SAELens would only notice after loading the model, or never.

    Args:
        values: All fields of SAELens's config of a run on a language model; the logger a mapping or SAELens's object.

    Raises:
        ConfigError: If there is something.
    """
    for field in ("model_name", "dataset_path", "cached_activations_path"):
        value = values.get(field)
        if not isinstance(value, str) or not value.startswith(("/", "./", "../", "~")):
            continue
        if not Path(value).expanduser().exists():
            raise ConfigError(f"{field}={value!r} looks like a local path, but nothing is there.")
    if not values["dataset_path"] and not values.get("use_cached_activations"):
        raise ConfigError("dataset_path is missing: give a Hugging Face dataset or a local folder.")
    # SAELens makes a folder of it, below checkpoint_path
    logger = values["logger"]
    wandb_id = logger.get("wandb_id") if isinstance(logger, Mapping) else getattr(logger, "wandb_id", None)
    if wandb_id is not None and (reason := why_no_folder(wandb_id)):
        raise ConfigError(f"logger.wandb_id={wandb_id!r} cannot be used, since it {reason}.")
    excluded, separator = values["exclude_special_tokens"], values["sequence_separator_token"]
    listed = excluded if isinstance(excluded, list) else []
    for field, ids in (("exclude_special_tokens", listed), ("sequence_separator_token", [separator])):
        if wrong := [i for i in ids if isinstance(i, bool) or (isinstance(i, int) and not 0 <= i < 2**31)]:
            raise ConfigError(f"{field}={values[field]!r}: {wrong[0]!r} is no token id; ids count from 0.")
    context_size, seqpos_slice = values["context_size"], values["seqpos_slice"]
    n_buffered = values["n_batches_in_buffer"] * len(range(context_size)[slice(*seqpos_slice)])
    if n_buffered == 0:
        raise ConfigError(f"seqpos_slice={seqpos_slice} leaves nothing of context_size={context_size}.")
    if n_buffered < values["train_batch_size_tokens"]:
        raise ConfigError(
            f"train_batch_size_tokens={values['train_batch_size_tokens']} is above the activation buffer of "
            f"n_batches_in_buffer * context_size = {n_buffered} tokens; raise n_batches_in_buffer."
        )


def _check_training_on(run: Mapping[str, Any], saes: Mapping[str, SAEFields]) -> None:
    """Refuse what cannot be used together with ``from_pretrained_path``."""
    if run.get("from_pretrained_path") is None:
        return
    if "saes" in run or "synthetic_model" in run:
        raise ConfigError(
            "from_pretrained_path is for a single SAE on a language model (sae): SAELens trains several, and those on "
            "synthetic data, from scratch only. --unset from_pretrained_path takes it out of the run file."
        )
    for field in ("decoder_init_norm", "jumprelu_init_threshold"):
        if field in saes["sae"]:
            raise ConfigError(
                f"sae.{field} says how weights start, but with from_pretrained_path they start as they stand there. "
                f"--unset sae.{field} takes it out of the run file."
            )


def _check_sae(fields: SAEFields, field: str) -> CheckedSAE:
    """Check an SAE; ``field`` is where its own stand, its others stand in the shared ``sae``."""

    def name(key: str) -> str:
        return f"{field}.{key}" if key in fields.maps[0] else f"sae.{key}"

    values = copy.deepcopy(dict(fields))  # SAELens edits lists that SAEs may share
    for key, instead in (("device", "device, which is the SAE's too"), ("metadata", "nothing: the run writes it")):
        if key in values:
            raise ConfigError(f"{name(key)} is not used; set {instead}. --unset {name(key)} takes it out.")
    architecture, known = values.pop("architecture", None), tables().training
    if architecture not in known:
        raise ConfigError(
            f"{name('architecture')}={architecture!r} is not an architecture that SAELens can train"
            f"{_nearest(str(architecture), known)}; they are {', '.join(sorted(known))}."
        )
    _check_standardization(values, known[architecture], architecture, name)
    _check_fields(values, known[architecture], f"config of {architecture}", name)
    missing = [key for key, f in known[architecture].items() if f.default is REQUIRED and key not in values]
    if missing:
        raise ConfigError(f"{field}.{missing[0]} is missing, which every {architecture} SAE needs.")
    check_sae_numbers(values, name)
    return CheckedSAE(field, architecture, values)


def _check_config(values: dict[str, Any], config: str, name: Callable[[str], str] = str) -> None:
    _check_fields(values, tables().configs[config], config, name)


def _check_standardization(
    values: Mapping[str, Any], fields: Fields, architecture: str, name: Callable[[str], str]
) -> None:
    """Refuse our way of normalizing for SAELens's own SAEs, and name what can be used instead."""
    field = "normalize_activations"
    if values.get(field) != CHANNEL_STANDARDIZATION or CHANNEL_STANDARDIZATION in get_args(fields[field].type):
        return
    if twin := ONE_LEVEL_TWINS.get(architecture):
        widths = (
            "its widths" if "matryoshka_widths" in values else f"matryoshka_widths=[{values.get('d_sae', 'd_sae')}]"
        )
        instead = f"{name('architecture')}={twin} with {widths}, which trains the same"
    else:
        instead = f"{name(field)}={COVARIANCE_WHITENING}"
    raise ConfigError(
        f"{name(field)}={CHANNEL_STANDARDIZATION} is this plugin's, and SAELens's {architecture} does not take it; set "
        f"{instead}."
    )


def _check_fields(values: dict[str, Any], fields: Fields, config: str, name: Callable[[str], str]) -> None:
    """Check keys and value types of a config, giving lists and whole floats the type that it wants.

    Errors name the ``config``, and a field by what ``name`` says that it is called in the run file.
    """
    for key, value in values.items():
        if key not in fields and key in REPLACED_FIELDS:
            raise ConfigError(f"{name(key)} is called {name(REPLACED_FIELDS[key])} now; rename it (CHANGELOG.md).")
        if key not in fields:
            raise ConfigError(
                f"{name(key)} is not a field of SAELens's {config}{_nearest(str(key), fields) or '.'} "
                f"--unset {name(key)} takes it out of the run file."
            )
        hint = fields[key].type
        if isinstance(hint, Nested) and isinstance(value, dict):
            _check_config(value, hint.config, f"{name(key)}.{{}}".format)
        if isinstance(hint, Nested) or hint is OBJECT:
            continue  # SAELens's own objects, built and checked field by field elsewhere
        if isinstance(value, list) and "tuple" in str(hint):
            values[key] = value = tuple(value)
        if isinstance(value, bool) and not _takes_bool(hint):
            raise ConfigError(f"{name(key)}={value!r} must be {_expected(hint)}.")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ConfigError(f"{name(key)}={value!r} is too large a number.")
        if hint is int and isinstance(value, float) and value.is_integer():
            values[key] = value = int(value)  # 500e6 tokens
        try:
            check_type(value, hint, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
        except TypeCheckError as error:
            raise ConfigError(f"{name(key)}={value!r} must be {_expected(hint)}.") from error
    _check_used(values, fields, name)


def _takes_bool(hint: Any) -> bool:
    """Whether a field may be true or false; to Python they are numbers too."""
    return hint in (bool, Any, dict, list) or any(map(_takes_bool, get_args(hint)))


def _expected(hint: Any) -> str:
    name = getattr(hint, "__name__", None) if isinstance(hint, type) and not get_args(hint) else None
    return name or str(hint).replace("typing.", "")


def _check_used(values: Mapping[str, Any], fields: Fields, name: Callable[[str], str]) -> None:
    """Refuse values that SAELens would accept and not use."""
    for key, value in values.items():
        if value is None or value == fields[key].default:
            continue
        if key in NEVER_READ:
            raise ConfigError(f"{name(key)}={value!r} is not used by SAELens. --unset {name(key)} takes it out.")
        other, needed = READ_ONLY_WITH.get(key, ("", ()))
        if other in fields and str(values.get(other, fields[other].default)).lower() not in needed:
            raise ConfigError(
                f"{name(key)}={value!r} is only used with {name(other)}={' or '.join(needed)}; set that, or "
                f"take it out with --unset {name(key)}."
            )


def _nearest(name: str, valid: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, list(valid), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def _check_trusted(value: Any, field: str = "") -> None:
    """Refuse a run file that would run the code of a data set or model."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _check_trusted(inner, f"{field}.{key}" if field else str(key))
    elif field.rpartition(".")[2] in ("trust_remote_code", "dataset_trust_remote_code") and value:
        raise ConfigError(
            f"{field}={value!r} runs code that comes with the model or data set, which a run file cannot decide; "
            f"read that code, then say so yourself with --trust-remote-code."
        )
