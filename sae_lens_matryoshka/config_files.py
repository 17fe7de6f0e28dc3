"""Run files: a YAML file whose keys are SAELens's runner fields, checked and turned into SAELens's config objects.

The data's way: YAML text -> plain dictionary (:func:`read_run_file`, with ``--set`` applied) -> SAELens's own config
objects (:func:`build_runner_configs`), which check the values. Everything that can be wrong in a file is reported here,
before a model is loaded.
"""

import copy
import dataclasses
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeAlias, get_args, get_type_hints

import torch
import yaml
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig, MultiSAETrainingRunnerConfig, TrainingSAEConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.synthetic import SyntheticModelConfig, SyntheticSAERunnerConfig, ZipfianFiringProbabilityConfig
from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

from sae_lens_matryoshka.errors import UserError

RunnerConfigs: TypeAlias = (
    "LanguageModelSAERunnerConfig[Any] | MultiSAETrainingRunnerConfig | dict[str, SyntheticSAERunnerConfig[Any]]"
)


class ConfigError(UserError):
    """A run file or setting that cannot be used; the message names the field, the value and the fix."""


def embedded_run_files() -> dict[str, Path]:
    """The run files that come with the package, by name."""
    package = Path(str(files("sae_lens_matryoshka")))
    # an installed package holds them, in a checkout they lie beside it
    folder = next(f for f in (package / "configs", package.parent / "configs") if f.is_dir())
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read_run_file(path_or_name: str | Path, settings: Iterable[str] = ()) -> dict[str, Any]:
    """Read a run file, apply settings to it, and return it as a plain dictionary.

    Args:
        path_or_name: Path of a YAML file, or the name of one that comes with the package.
        settings: Changes as ``key.sub=value``, the value in YAML; entries of a list are named by their index.

    Raises:
        ConfigError: If there is no such file, it is not a YAML mapping, or a setting cannot be applied.
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
        run = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(run, dict):
        raise ConfigError(f"{path} must hold a mapping of SAELens runner fields to values, not {type(run).__name__}.")
    for setting in settings:
        _apply_setting(run, setting)
    return run


def build_runner_configs(run: Mapping[str, Any]) -> RunnerConfigs:
    """Turn a run file's contents into the config of the SAELens runner it is meant for.

    ``synthetic_model`` selects the ``SyntheticSAERunner``, one run for each SAE on the same synthetic model; otherwise
    ``saes`` selects the ``MultiSAETrainingRunner`` and ``sae`` the ``LanguageModelSAETrainingRunner``.

    Raises:
        ConfigError: If a key is unknown (the nearest valid one is named), a value has the wrong type, or SAELens
            refuses a value.
    """
    run = copy.deepcopy(dict(run))
    if "synthetic_model" in run:
        saes = _named_saes(run["saes"]) if "saes" in run else {"sae": _required(run, "sae")}
        shared = {key: value for key, value in run.items() if key != "saes"}
        return {
            name: _build(SyntheticSAERunnerConfig, {**shared, "sae": sae}, sae_field=f"saes.{name}")
            for name, sae in saes.items()
        }
    if "saes" in run:
        config = _build(MultiSAETrainingRunnerConfig, {**run, "saes": _named_saes(run["saes"])})
    else:
        _required(run, "sae")
        config = _build(LanguageModelSAERunnerConfig, run)
    _check_language_model_run(config)
    return config


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, except that 3e-4 is a number, as in YAML 1.2 and Python."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*\.?|\d*\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _apply_setting(run: dict[str, Any], setting: str) -> None:
    key, separator, text = setting.partition("=")
    if not separator or not key:
        raise ConfigError(f"The setting {setting!r} is not of the form key.sub=value, for example lr=3e-4 or sae.k=40.")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"The value of the setting {setting!r} is not valid YAML; quote it.") from error
    *parents, last = key.split(".")
    target: Any = run
    for depth, part in enumerate(parents):
        target = target.setdefault(part, {}) if isinstance(target, dict) else target[_list_index(target, part, setting)]
        if not isinstance(target, (dict, list)):
            raise ConfigError(f"The setting {setting!r} reaches into {'.'.join(parents[: depth + 1])}, a plain value.")
    if isinstance(target, dict):
        target[last] = value
    else:
        target[_list_index(target, last, setting)] = value


def _list_index(target: list[Any], part: str, setting: str) -> int:
    if not part.isdecimal() or int(part) >= len(target):
        raise ConfigError(f"The setting {setting!r} needs an index from 0 to {len(target) - 1} in place of {part!r}.")
    return int(part)


def _required(run: Mapping[str, Any], key: str) -> Any:
    if key not in run:
        raise ConfigError(f"The field {key!r} is missing: say which SAE to train (or 'saes' for several).")
    return run[key]


def _named_saes(saes: Any) -> dict[str, Any]:
    """The entries of ``saes``, a mapping or a list, by name; unnamed list entries are named ``<architecture>_k<k>``."""
    if isinstance(saes, dict) and saes:
        return saes
    if not isinstance(saes, list) or not saes or not all(isinstance(entry, dict) for entry in saes):
        raise ConfigError(f"saes={saes!r} must be a list or mapping of SAE configs.")
    named: dict[str, Any] = {}
    for entry in saes:
        sae = dict(entry)
        suffix = f"_k{sae['k']}" if "k" in sae else ""
        name = str(sae.pop("name", f"{sae.get('architecture')}{suffix}"))
        if name in named:
            raise ConfigError(f"Two entries of saes are called {name!r}; give them different names with 'name'.")
        named[name] = sae
    return named


def _build(config_class: type, run: Mapping[str, Any], sae_field: str = "sae") -> Any:
    """Make a SAELens config from a dictionary, checking keys and types on the way."""
    values = dict(run)
    _check_fields(values, config_class, prefix="")
    if "sae" in values:
        values["sae"] = _build_sae(values["sae"], sae_field)
    if "saes" in values:
        values["saes"] = {name: _build_sae(sae, f"saes.{name}") for name, sae in values["saes"].items()}
    if "synthetic_model" in values:
        values["synthetic_model"] = _build_synthetic_model(values["synthetic_model"])
    if "logger" in values:
        values["logger"] = _build_plain(LoggingConfig, values["logger"], "logger")
    _resolve_devices(values)
    with _config_errors(config_class.__name__):
        return config_class(**values)


def _build_sae(sae: Any, field: str) -> TrainingSAEConfig:
    if not isinstance(sae, dict):
        raise ConfigError(f"{field}={sae!r} must be a mapping of SAE config fields.")
    values = dict(sae)
    architecture = values.pop("architecture", None)
    if architecture not in SAE_TRAINING_CLASS_REGISTRY:
        raise ConfigError(
            f"{field}.architecture={architecture!r} is not an architecture that SAELens can train"
            f"{_nearest(str(architecture), SAE_TRAINING_CLASS_REGISTRY)}; "
            f"they are {', '.join(sorted(SAE_TRAINING_CLASS_REGISTRY))}."
        )
    return _build_plain(SAE_TRAINING_CLASS_REGISTRY[architecture][1], values, field)


def _build_synthetic_model(synthetic_model: Any) -> SyntheticModelConfig | str:
    if isinstance(synthetic_model, str):
        return synthetic_model
    if not isinstance(synthetic_model, dict):
        raise ConfigError(f"synthetic_model={synthetic_model!r} must be a mapping, a path or a Hub repository.")
    _check_fields(synthetic_model, SyntheticModelConfig, "synthetic_model.")
    defaults = {"firing_probability": ZipfianFiringProbabilityConfig().to_dict()}
    with _config_errors("synthetic_model"):
        return SyntheticModelConfig.from_dict({**defaults, **synthetic_model})


def _build_plain(config_class: type, values: Any, field: str) -> Any:
    if not isinstance(values, dict):
        raise ConfigError(f"{field}={values!r} must be a mapping of {config_class.__name__} fields.")
    values = dict(values)
    _check_fields(values, config_class, f"{field}.")
    with _config_errors(field):
        return config_class(**values)


def _check_fields(values: dict[str, Any], config_class: type, prefix: str) -> None:
    """Check keys and value types against a dataclass, giving lists and whole floats the type that it wants."""
    hints = get_type_hints(config_class)
    valid = {f.name for f in dataclasses.fields(config_class) if f.init and not f.name.startswith("_")}
    for key, value in values.items():
        if key not in valid:
            raise ConfigError(
                f"{prefix}{key} is not a field of SAELens's {config_class.__name__}{_nearest(str(key), valid)}."
            )
        if nested := _nested_config_class(hints[key]):
            if isinstance(value, dict):
                _check_fields(value, nested, f"{prefix}{key}.")
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
                f"{prefix}{key}={value!r} must be {expected or str(hints[key]).replace('typing.', '')}."
            ) from error


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
    """Replace the device ``auto`` by the best one at hand, and refuse CUDA devices that are not there."""
    best = "cuda" if torch.cuda.is_available() else "cpu"
    for field in ("device", "llm_device", "act_store_device"):
        device = values.get(field)
        if device == "auto":
            values[field] = best
        elif isinstance(device, str) and device.startswith("cuda") and best != "cuda":
            raise ConfigError(f"{field}={device!r}, but this machine has no CUDA device; set {field}=cpu.")


def _check_language_model_run(config: "LanguageModelSAERunnerConfig[Any] | MultiSAETrainingRunnerConfig") -> None:
    """Catch what SAELens would only notice after loading the model."""
    for field in ("model_name", "dataset_path"):
        value = getattr(config, field)
        if value.startswith(("/", "./", "../", "~")) and not Path(value).expanduser().exists():
            raise ConfigError(f"{field}={value!r} looks like a local path, but nothing is there.")
    if not config.dataset_path and not getattr(config, "use_cached_activations", False):
        raise ConfigError("dataset_path is missing: give a Hugging Face dataset or a local folder.")
    n_buffered = config.n_batches_in_buffer * len(range(config.context_size)[slice(*config.seqpos_slice)])
    if n_buffered < config.train_batch_size_tokens:
        raise ConfigError(
            f"train_batch_size_tokens={config.train_batch_size_tokens} is above the activation buffer of "
            f"n_batches_in_buffer * context_size = {n_buffered} tokens; raise n_batches_in_buffer."
        )
