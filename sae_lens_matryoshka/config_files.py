"""Run files: a YAML file whose keys are SAELens's runner fields, checked and turned into SAELens's config objects.

The data's way: YAML text -> plain dictionary (:func:`read_run_file`, with ``--unset`` and ``--set`` applied) ->
SAELens's own config objects (:func:`build_runner_configs`), which check the values. Everything that can be wrong in a
file is reported here, before a model is loaded.
"""

import copy
import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeAlias, get_args, get_type_hints

import yaml
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig, MultiSAETrainingRunnerConfig, TrainingSAEConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.synthetic import SyntheticModelConfig, SyntheticSAERunnerConfig, ZipfianFiringProbabilityConfig
from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

from sae_lens_matryoshka.devices import resolve_device
from sae_lens_matryoshka.errors import ConfigError
from sae_lens_matryoshka.run_file_numbers import check_run_numbers, check_sae_numbers
from sae_lens_matryoshka.run_file_saes import SAEFields, named_saes, why_no_folder
from sae_lens_matryoshka.run_file_settings import apply_setting, load_yaml, remove_field

RunnerConfigs: TypeAlias = (
    "LanguageModelSAERunnerConfig[Any] | MultiSAETrainingRunnerConfig | dict[str, SyntheticSAERunnerConfig[Any]]"
)

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


def embedded_run_files() -> dict[str, Path]:
    """The run files that come with the package, by name."""
    package = Path(str(files("sae_lens_matryoshka")))
    # an installed package holds them, in a checkout they lie beside it
    folder = next(f for f in (package / "configs", package.parent / "configs") if f.is_dir())
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read_run_file(path_or_name: str | Path, settings: Iterable[str] = (), unset: Iterable[str] = ()) -> dict[str, Any]:
    """Read a run file, apply settings to it, and return it as a plain dictionary.

    Args:
        path_or_name: Path of a YAML file, or the name of one that comes with the package.
        settings: Changes as ``key.sub=value``, the value in YAML; an entry of ``saes`` goes by its name, in a list also
            by its index.
        unset: Fields to take out, as ``key.sub``, before the settings are applied.

    Raises:
        ConfigError: If there is no such file, it is not a YAML mapping, a field to take out is not there, or a setting
            cannot be applied.
    """
    path = Path(path_or_name)
    embedded = embedded_run_files()
    if not path.is_file():
        if str(path_or_name) not in embedded:
            raise ConfigError(
                f"There is no run file {str(path_or_name)!r}; give the path of a YAML file or one of the embedded "
                f"names {', '.join(embedded)}."
            )
        path = embedded[str(path_or_name)]
    try:
        run = load_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(run, dict):
        raise ConfigError(f"{path} must hold a mapping of SAELens runner fields to values, not {type(run).__name__}.")
    for key in unset:
        remove_field(run, key)
    for setting in settings:
        apply_setting(run, setting)
    return run


def build_runner_configs(run: Mapping[str, Any], trust_remote_code: bool = False) -> RunnerConfigs:
    """Turn a run file's contents into the config of the SAELens runner it is meant for.

    ``synthetic_model`` selects the ``SyntheticSAERunner``, one run for each SAE on the same synthetic model; otherwise
    ``saes`` selects the ``MultiSAETrainingRunner`` and ``sae`` the ``LanguageModelSAETrainingRunner``. A ``sae`` beside
    ``saes`` gives its fields to every entry that has none of its own.

    Args:
        run: The run file's contents.
        trust_remote_code: Whether the run file may ask for code of a model or data set to be run.

    Raises:
        ConfigError: If a key is unknown (the nearest valid one is named) or would not be used, a value has the wrong
            type, an SAE's name cannot be a folder, or SAELens refuses a value.
    """
    run = dict(run)
    if not trust_remote_code:
        _check_trusted(run)
    sae_fields = named_saes(run)
    _check_training_on(run, sae_fields)
    field = "saes.{}" if "saes" in run else "sae"
    saes = {name: _build_sae(fields, field.format(name)) for name, fields in sae_fields.items()}
    shared = copy.deepcopy({key: value for key, value in run.items() if key not in ("sae", "saes")})
    if "synthetic_model" in run:
        configs = {name: _build(SyntheticSAERunnerConfig, {**shared, "sae": sae}) for name, sae in saes.items()}
        for name, config in configs.items():
            if isinstance(config.synthetic_model, SyntheticModelConfig):
                check_synthetic_d_in(field.format(name), config.sae.d_in, config.synthetic_model.hidden_dim)
        return configs
    if "saes" in run:
        # names from Python may be numbers, as in a file
        for key in ("hook_names", "hook_head_indices"):
            if isinstance(shared.get(key), Mapping):
                shared[key] = {str(name): value for name, value in shared[key].items()}
        config = _build(MultiSAETrainingRunnerConfig, {**shared, "saes": saes})
    else:
        config = _build(LanguageModelSAERunnerConfig, {**shared, "sae": saes["sae"]})
    _check_language_model_run(config)
    return config


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


def _build(config_class: type, run: Mapping[str, Any]) -> Any:
    """Make a SAELens config from a dictionary, checking keys and types on the way."""
    values = dict(run)
    _check_fields(values, config_class)
    if "synthetic_model" in values:
        values["synthetic_model"] = _build_synthetic_model(values["synthetic_model"])
    if "logger" in values:
        values["logger"] = _build_plain(LoggingConfig, values["logger"], "logger", "logger.{}".format)
    _resolve_devices(values)
    check_run_numbers(values, config_class)
    with _config_errors(config_class.__name__):
        return config_class(**values)


def _build_sae(fields: SAEFields, field: str) -> TrainingSAEConfig:
    """Make an SAE's config; ``field`` is where its own fields stand, its others stand in the shared ``sae``."""

    def name(key: str) -> str:
        return f"{field}.{key}" if key in fields.maps[0] else f"sae.{key}"

    values = copy.deepcopy(dict(fields))  # SAELens edits lists that SAEs may share
    for key, instead in (("device", "device, which is the SAE's too"), ("metadata", "nothing: the run writes it")):
        if key in values:
            raise ConfigError(f"{name(key)} is not used; set {instead}. --unset {name(key)} takes it out.")
    architecture = values.pop("architecture", None)
    if architecture not in SAE_TRAINING_CLASS_REGISTRY:
        raise ConfigError(
            f"{name('architecture')}={architecture!r} is not an architecture that SAELens can train"
            f"{_nearest(str(architecture), SAE_TRAINING_CLASS_REGISTRY)}; "
            f"they are {', '.join(sorted(SAE_TRAINING_CLASS_REGISTRY))}."
        )
    config = _build_plain(SAE_TRAINING_CLASS_REGISTRY[architecture][1], values, field, name)
    check_sae_numbers(values, name)
    return config


def _build_synthetic_model(synthetic_model: Any) -> SyntheticModelConfig | str:
    if isinstance(synthetic_model, str):
        return synthetic_model
    if not isinstance(synthetic_model, dict):
        raise ConfigError(f"synthetic_model={synthetic_model!r} must be a mapping, a path or a Hub repository.")
    _check_fields(synthetic_model, SyntheticModelConfig, "synthetic_model.{}".format)
    defaults = {"firing_probability": ZipfianFiringProbabilityConfig().to_dict()}
    with _config_errors("synthetic_model"):
        return SyntheticModelConfig.from_dict({**defaults, **synthetic_model})


def _build_plain(config_class: type, values: Any, field: str, name: Callable[[str], str]) -> Any:
    if not isinstance(values, dict):
        raise ConfigError(f"{field}={values!r} must be a mapping of {config_class.__name__} fields.")
    values = dict(values)
    _check_fields(values, config_class, name)
    with _config_errors(field):
        return config_class(**values)


def _check_fields(values: dict[str, Any], config_class: type, name: Callable[[str], str] = str) -> None:
    """Check keys and value types against a dataclass, giving lists and whole floats the type that it wants.

    Args:
        values: The fields that the run file gives.
        config_class: The dataclass.
        name: What a field is called in the run file.
    """
    hints = get_type_hints(config_class)
    valid = {f.name for f in dataclasses.fields(config_class) if f.init and not f.name.startswith("_")}
    for key, value in values.items():
        if key not in valid:
            raise ConfigError(
                f"{name(key)} is not a field of SAELens's {config_class.__name__}{_nearest(str(key), valid) or '.'} "
                f"--unset {name(key)} takes it out of the run file."
            )
        if nested := _nested_config_class(hints[key]):
            if isinstance(value, dict):
                _check_fields(value, nested, lambda inner, outer=key: f"{name(outer)}.{inner}")
            continue
        if not _is_plain(hints[key]):
            continue  # SAELens's own objects, built and checked field by field elsewhere
        if isinstance(value, list) and "tuple" in str(hints[key]):
            values[key] = value = tuple(value)
        if hints[key] is int and isinstance(value, float) and value.is_integer():
            values[key] = value = int(value)  # 500e6 tokens
        try:
            check_type(value, hints[key], collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
        except TypeCheckError as error:
            expected = getattr(hints[key], "__name__", None) if isinstance(hints[key], type) else None
            raise ConfigError(
                f"{name(key)}={value!r} must be {expected or str(hints[key]).replace('typing.', '')}."
            ) from error
    _check_used(values, config_class, name)


def _check_used(values: Mapping[str, Any], config_class: type, name: Callable[[str], str]) -> None:
    """Refuse values that SAELens would accept and not use."""
    defaults = {f.name: f.default for f in dataclasses.fields(config_class)}
    for key, value in values.items():
        if value is None or value == defaults[key]:
            continue
        if key in NEVER_READ:
            raise ConfigError(f"{name(key)}={value!r} is not used by SAELens. --unset {name(key)} takes it out.")
        other, needed = READ_ONLY_WITH.get(key, ("", ()))
        if other in defaults and str(values.get(other, defaults[other])).lower() not in needed:
            raise ConfigError(
                f"{name(key)}={value!r} is only used with {name(other)}={' or '.join(needed)}; set that, or "
                f"take it out with --unset {name(key)}."
            )


def _nested_config_class(hint: Any) -> type | None:
    """The dataclass in a hint such as ``HierarchyConfig | None``, if it is one that a dictionary can fill directly."""
    for candidate in (hint, *get_args(hint)):
        if (
            isinstance(candidate, type)
            and dataclasses.is_dataclass(candidate)
            and not getattr(candidate, "__abstractmethods__", None)
            and candidate is not LoggingConfig
            and candidate is not SyntheticModelConfig
        ):
            return candidate
    return None


def _is_plain(hint: Any) -> bool:
    """Whether a hint speaks of plain YAML values only."""
    if hint in (Any, None, type(None), Ellipsis) or isinstance(hint, (str, int, bool)):  # the latter: Literal's values
        return True
    arguments = get_args(hint)
    return all(map(_is_plain, arguments)) if arguments else hint in (bool, int, float, str, dict, list, tuple)


def _nearest(name: str, valid: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, list(valid), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


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
    for field in ("device", "llm_device", "act_store_device"):
        if isinstance(values.get(field), str) and (field, values[field]) not in _NAMES_ANOTHER_FIELD:
            values[field] = resolve_device(values[field], field)


_NAMES_ANOTHER_FIELD = (("act_store_device", "with_model"),)


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


def _check_language_model_run(config: "LanguageModelSAERunnerConfig[Any] | MultiSAETrainingRunnerConfig") -> None:
    """Catch what SAELens would only notice after loading the model, or never."""
    for field in ("model_name", "dataset_path"):
        value = getattr(config, field)
        if value.startswith(("/", "./", "../", "~")) and not Path(value).expanduser().exists():
            raise ConfigError(f"{field}={value!r} looks like a local path, but nothing is there.")
    if not config.dataset_path and not getattr(config, "use_cached_activations", False):
        raise ConfigError("dataset_path is missing: give a Hugging Face dataset or a local folder.")
    # SAELens makes a folder of it, below checkpoint_path
    if config.logger.wandb_id is not None and (reason := why_no_folder(config.logger.wandb_id)):
        raise ConfigError(f"logger.wandb_id={config.logger.wandb_id!r} cannot be used, since it {reason}.")
    separator = config.sequence_separator_token
    excluded = config.exclude_special_tokens if isinstance(config.exclude_special_tokens, list) else []
    for field, ids in (("exclude_special_tokens", excluded), ("sequence_separator_token", [separator])):
        if wrong := [i for i in ids if isinstance(i, bool) or (isinstance(i, int) and not 0 <= i < 2**31)]:
            raise ConfigError(f"{field}={getattr(config, field)!r}: {wrong[0]!r} is no token id; ids count from 0.")
    n_buffered = config.n_batches_in_buffer * len(range(config.context_size)[slice(*config.seqpos_slice)])
    if n_buffered == 0:
        raise ConfigError(f"seqpos_slice={config.seqpos_slice} leaves nothing of context_size={config.context_size}.")
    if n_buffered < config.train_batch_size_tokens:
        raise ConfigError(
            f"train_batch_size_tokens={config.train_batch_size_tokens} is above the activation buffer of "
            f"n_batches_in_buffer * context_size = {n_buffered} tokens; raise n_batches_in_buffer."
        )
