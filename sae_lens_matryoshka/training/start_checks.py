"""What can only be checked once SAELens has loaded model and data set, told in one sentence."""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from datasets.exceptions import DatasetGenerationError
from sae_lens import ActivationsStore, LanguageModelSAERunnerConfig
from sae_lens import logger as saelens_logger
from safetensors import SafetensorError
from transformers import AutoConfig

from sae_lens_matryoshka.errors import ConfigError, UserError, first_line
from sae_lens_matryoshka.run_files.building import LanguageModelRunConfig


@contextmanager
def loading_errors(cfg: LanguageModelRunConfig) -> Iterator[None]:
    """Say in one sentence what could not be loaded, and for model and data set how to use local copies."""
    try:
        with _as_configured():
            yield
    except UserError:
        raise
    except OSError as error:  # what transformers, datasets and huggingface_hub raise for missing files and no network
        what = f"data set {cfg.dataset_path!r}" if cfg.dataset_path in str(error) else f"model {cfg.model_name!r}"
        raise ConfigError(
            f"Could not load the {what} from the Hugging Face Hub or the local cache ({first_line(error)}); to use "
            f"local copies set model_name and dataset_path to their folders: --set model_name=DIR --set "
            f"dataset_path=DIR."
        ) from error
    except SafetensorError as error:
        raise ConfigError(
            f"The weights of the model {cfg.model_name!r} are truncated or damaged ({error}); fetch or copy it again."
        ) from error
    except DatasetGenerationError as error:  # files of a data set on the Hub that do not go together
        reason = " ".join(str(error.__cause__ or error).split())[:300].rstrip(".")
        raise ConfigError(
            f"The data set {cfg.dataset_path!r} cannot be read ({reason}); try streaming=true."
        ) from error
    except TypeError as error:  # arguments that the model's class does not take
        if not (cfg.model_from_pretrained_kwargs or cfg.model_kwargs):
            raise
        raise ConfigError(
            f"model_from_pretrained_kwargs or model_kwargs cannot be used with {cfg.model_name!r}: {error}."
        ) from error
    except ValueError as error:  # unknown model names, model classes, hooks and data set columns
        raise ConfigError(f"SAELens cannot start this run: {str(error).splitlines()[0]}") from error


@contextmanager
def _as_configured() -> Iterator[None]:
    """Silence what SAELens says of a data set that it is handed: here it is the one that the run file names."""

    def says_something_else(record: logging.LogRecord) -> bool:
        return "will not be reproducible" not in record.getMessage()

    saelens_logger.addFilter(says_something_else)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The training dataset contains fewer samples")  # than tokens to train on
            yield
    finally:
        saelens_logger.removeFilter(says_something_else)


def check_context_size(cfg: LanguageModelRunConfig) -> None:
    """Refuse a context that is longer than the model's, before the model is loaded.

    Models whose config cannot be read by itself are left to SAELens.

    Raises:
        ConfigError: If ``context_size`` is above the number of positions that the model was made for.
    """
    try:
        model_config = AutoConfig.from_pretrained(cfg.model_name, trust_remote_code=False).get_text_config()
    except (OSError, ValueError, KeyError):
        return
    longest = getattr(model_config, "max_position_embeddings", None)
    if isinstance(longest, int) and cfg.context_size > longest:
        raise ConfigError(
            f"context_size={cfg.context_size} is above the {longest} positions of {cfg.model_name}; set context_size="
            f"{longest} or less."
        )


def check_is_text(cfg: LanguageModelSAERunnerConfig[Any], store: ActivationsStore) -> None:
    """Refuse tokens where the run file says that the data set holds text: SAELens goes by the data set's columns.

    That it is said to hold tokens is SAELens's default, so it does not count as said.

    Args:
        cfg: The run's config.
        store: Its activation store.

    Raises:
        ConfigError: If SAELens has found tokens.
    """
    if store.cached_activation_dataset is None and store.is_dataset_tokenized and not cfg.is_dataset_tokenized:
        raise ConfigError(
            f"is_dataset_tokenized=False, but the data set has a column {store.tokens_column!r}, which is what SAELens "
            f"trains on; set is_dataset_tokenized=true, or rename the column."
        )


def check_token_ids(cfg: LanguageModelRunConfig, model: Any) -> None:
    """Refuse token ids that the model does not have: excluding them would exclude nothing.

    Args:
        cfg: The run's config.
        model: The model that SAELens has loaded, with its tokenizer where it has one.

    Raises:
        ConfigError: If ``exclude_special_tokens`` or ``sequence_separator_token`` names such an id.
    """
    tokenizer = getattr(model, "tokenizer", None)
    vocabulary = range(model.cfg.d_vocab) if tokenizer is None else set(tokenizer.get_vocab().values())
    for field in ("exclude_special_tokens", "sequence_separator_token"):
        value = getattr(cfg, field)
        ids = value if isinstance(value, list) else [value]
        if unknown := [i for i in ids if isinstance(i, int) and not isinstance(i, bool) and i not in vocabulary]:
            raise ConfigError(
                f"{field}={value!r}: {unknown[0]} is not a token of {cfg.model_name}, whose ids go up to "
                f"{max(vocabulary)}."
            )


def check_d_in(store: ActivationsStore, d_in: Mapping[str, int]) -> None:
    """Refuse a ``d_in`` that is not the width of the hook, before anything is trained.

    Args:
        store: The run's activation store.
        d_in: The width that the run file gives, by hook name.
    """
    if store.dataset is None or store.cached_activation_dataset is not None:
        return  # SAELens has compared cached activations with d_in
    token = torch.zeros((1, 1), dtype=torch.long, device=next(store.model.parameters()).device)
    _, cache = store.model.run_with_cache(token, names_filter=list(d_in), prepend_bos=False, **store.model_kwargs)
    for hook_name, expected in d_in.items():
        activation = cache[hook_name]
        head = store.hook_head_index
        if head is None:
            activation = activation.reshape(1, 1, -1)
        elif activation.ndim != 4 or not 0 <= head < activation.shape[2]:
            heads = f"{activation.shape[2]} heads" if activation.ndim == 4 else "no heads"
            raise ConfigError(f"hook_head_index={head}, but {hook_name} of this model has {heads}; leave it out.")
        if activation.shape[-1] != expected:
            raise ConfigError(
                f"sae.d_in={expected}, but {hook_name} of this model is {activation.shape[-1]} wide; "
                f"set sae.d_in={activation.shape[-1]}."
            )
