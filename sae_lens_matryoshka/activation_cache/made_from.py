"""What the activations of a run are made from: two runs for which it is the same can share them."""

import json
from collections.abc import Collection, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from datasets.config import DATASET_STATE_JSON_FILENAME
from huggingface_hub import try_to_load_from_cache
from sae_lens import MultiSAETrainingRunnerConfig

from sae_lens_matryoshka.errors import ConfigError
from sae_lens_matryoshka.run_files.building import LanguageModelRunConfig
from sae_lens_matryoshka.saved.fingerprints import content_hash, file_hash

_FIELDS = (
    "model_class_name", "model_from_pretrained_kwargs", "model_kwargs", "autocast_lm", "context_size", "seqpos_slice",
    "prepend_bos", "exclude_special_tokens", "sequence_separator_token", "disable_concat_sequences",
    "use_chat_formatting",
)  # fmt: skip
"""Fields of SAELens's configs that decide on the activations beside model, hooks and data set. Where and how fast they
are computed is not among them."""

_BY_CONTENT = {"model_name": "model_content", "dataset_path": "dataset_content"}
"""Names that stand for what they name, where that is known."""

_MODEL_FILES = (".safetensors", ".bin", ".gguf", ".json", ".model", ".tiktoken", ".txt", ".jinja", ".py")
"""Endings of what decides on a model and its tokenizer: weights, settings, vocabularies, and code that comes along."""


def hooks_of(cfg: LanguageModelRunConfig) -> dict[str, dict[str, Any]]:
    """The hooks that a run reads, with the width and head of each."""
    if isinstance(cfg, MultiSAETrainingRunnerConfig):
        return {
            hook: {"d_in": cfg.saes[name].d_in, "hook_head_index": cfg.hook_head_indices_per_sae[name]}
            for name, hook in cfg.hook_names_per_sae.items()
        }
    return {cfg.hook_name: {"d_in": cfg.sae.d_in, "hook_head_index": cfg.hook_head_index}}


def made_from(cfg: LanguageModelRunConfig) -> dict[str, Any]:
    """Everything of a run that decides on its activations, as JSON holds it.

    Models and data sets on this machine go by the contents of their files; a model on the Hub by the commit of it that
    is here, if one is, and a data set on the Hub by its name.

    Args:
        cfg: The run's config.

    Raises:
        OSError: If a file of model or data set cannot be read.
    """
    fields = {
        "model_name": cfg.model_name,
        "model_content": _model_content(cfg.model_name),
        "dataset_path": cfg.dataset_path,
        "dataset_content": _content(Path(cfg.dataset_path).expanduser()) if cfg.dataset_path else None,
        **{name: getattr(cfg, name) for name in _FIELDS},
        "model_from_pretrained_kwargs": {  # transformers takes both names, and types by name or as objects
            "dtype" if name == "torch_dtype" else name: str(value).removeprefix("torch.") if "dtype" in name else value
            for name, value in (cfg.model_from_pretrained_kwargs or {}).items()
        },
        "hooks": hooks_of(cfg),
    }
    return json.loads(json.dumps(fields, default=str))


def differences(made: Mapping[str, Any], wanted: Mapping[str, Any], hooks: Collection[str] = ()) -> list[str]:
    """In what a run differs from what activations were made from, each in a few words.

    Args:
        made: What they were made from.
        wanted: What the run would make them from.
        hooks: The hooks to compare; empty for those that the run reads.
    """
    found: list[str] = []
    for name in ("model_name", "dataset_path", *_FIELDS):
        content = _BY_CONTENT.get(name)
        if content and made.get(content) and wanted[content]:
            if made[content] != wanted[content]:
                found.append(f"{name}={wanted[name]!r} has other contents than {made.get(name)!r} had")
        elif made.get(name) != wanted[name]:
            found.append(f"{name}={wanted[name]!r}, not {made.get(name)!r}")
    for hook in hooks or wanted["hooks"]:
        fields, cached = wanted["hooks"].get(hook), made["hooks"].get(hook)
        if cached is None:
            found.append(f"hook {hook!r}, which is not among {', '.join(made['hooks'])}")
        elif fields is None:
            found.append(f"no hook {hook!r}")
        else:
            found += [
                f"{key}={value} at {hook}, not {cached.get(key)}"
                for key, value in fields.items()
                if value != cached.get(key)
            ]
    return found


def _model_content(name: str) -> str | None:
    folder = Path(name).expanduser()
    if folder.is_dir():
        files = sorted(file for file in folder.iterdir() if file.suffix in _MODEL_FILES and not file.is_dir())
        return content_hash([[file.name, file_hash(file)] for file in files])
    try:
        config = try_to_load_from_cache(name, "config.json")
    except ValueError:  # no name that the Hub could have
        return None
    return f"commit {Path(config).parent.name}" if isinstance(config, str) else None


def _content(path: Path) -> str | None:
    if path.is_file():
        return file_hash(path)
    if not path.is_dir():
        return None
    files = sorted(file for file in path.rglob("*") if file.is_file() and not _is_left_beside(file, path))
    return content_hash([[str(file.relative_to(path)), file_hash(file)] for file in files])


def _is_left_beside(file: Path, folder: Path) -> bool:
    """Whether a file in a data set's folder is never read as data: hidden, a lock, or what the package datasets has
    computed of a data set that ``save_to_disk`` has left. In any other folder it reads a file of that name.
    """
    if any(part.startswith(".") for part in file.relative_to(folder).parts) or file.suffix == ".lock":
        return True
    return fnmatch(file.name, "cache-*.arrow") and (file.parent / DATASET_STATE_JSON_FILENAME).is_file()


def check_outside_sources(output: Path, cfg: LanguageModelRunConfig, option: str = "--output") -> None:
    """Refuse to write into what activations are made from: they would go by other contents afterwards.

    Args:
        output: The folder to write.
        cfg: The run's config.
        option: What the user names it with.

    Raises:
        ConfigError: If the run's data set or model on this machine lies in it, or it in one of them.
    """
    for name in _BY_CONTENT:
        source = Path(getattr(cfg, name) or "").expanduser()
        if not getattr(cfg, name) or not source.exists():
            continue
        inner, outer = output.resolve(), source.resolve()
        if outer.is_relative_to(inner):
            inner, outer = outer, inner
        if inner.is_relative_to(outer):
            raise ConfigError(
                f"The folder {output} and {name}={getattr(cfg, name)!r} lie one in the other, but what activations are "
                f"made from must stay as it is; choose a folder beside it with {option}."
            )
