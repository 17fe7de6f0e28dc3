"""Whether token ids are those of the run's model: how they were made, and whether the model knows them all."""

import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute
from datasets import Dataset, IterableDataset
from sae_lens import ActivationsStore
from sae_lens.pretokenize_runner import get_special_token_from_cfg
from transformers import AutoTokenizer

from sae_lens_matryoshka.errors import ConfigError, first_line
from sae_lens_matryoshka.run_files.building import LanguageModelRunConfig
from sae_lens_matryoshka.saved.checks import read_json

pc: Any = pyarrow.compute  # it makes its functions when it is imported, unseen by type checkers

logger = logging.getLogger(__name__)

PRETOKENIZATION_FILENAME = "sae_lens.json"
"""What SAELens's ``PretokenizeRunner`` writes beside the tokens: how they were made."""

CHECKED_TOKENS = 10_000_000
"""How many tokens are looked at before training: evenly spaced rows, or the first ones where files are streamed."""

CHECKED_HUB_ROWS = 100
"""How many rows are looked at where they come from the Hub one by one."""


def check_pretokenization(cfg: LanguageModelRunConfig) -> None:
    """Compare the run with the ``sae_lens.json`` beside its data set, if there is one, as far as no model is needed.

    Raises:
        ConfigError: If they contradict each other.
    """
    made = _pretokenization(cfg)
    context_size = made.get("context_size")
    if isinstance(context_size, int) and context_size < cfg.context_size:
        raise _contradiction(cfg, "context_size", f"rows of {context_size} tokens", context_size)
    separate = made.get("disable_concat_sequences", cfg.disable_concat_sequences)
    if separate != cfg.disable_concat_sequences:
        raise _contradiction(cfg, "disable_concat_sequences", f"tokens made with {separate}", separate)


def check_token_data(store: ActivationsStore, cfg: LanguageModelRunConfig) -> None:
    """Compare the token ids of a run with its model, its tokenizer and ``prepend_bos``.

    Args:
        store: The run's store, model and data set loaded. One of text is left alone.
        cfg: The run.

    Raises:
        ConfigError: If there are ids that the model has no embedding for, or ``sae_lens.json`` speaks of another
            tokenizer or other special tokens than the run.
    """
    if store.dataset is None or not store.is_dataset_tokenized:
        return
    rows, step = _some_rows(store, cfg)
    _check_ids(rows, step, store, cfg)
    tokenizer: Any = getattr(store.model, "tokenizer", None)
    if tokenizer is None:
        return
    made = _pretokenization(cfg)
    if isinstance(made.get("tokenizer_name"), str):
        _check_tokenizer(made["tokenizer_name"], tokenizer, cfg)
    _check_bos(made, rows, tokenizer, cfg)
    if "sequence_separator_token" in made and not made.get("disable_concat_sequences"):
        recorded, asked = made["sequence_separator_token"], cfg.sequence_separator_token
        if get_special_token_from_cfg(recorded, tokenizer) != get_special_token_from_cfg(asked, tokenizer):
            raise _contradiction(cfg, "sequence_separator_token", f"tokens made with {recorded!r}", recorded)


def vocabulary_size(model: Any) -> int | None:
    """How many token ids a model has embeddings for; None if it does not tell."""
    if hasattr(model, "W_E"):
        return model.W_E.shape[0]
    embeddings = getattr(getattr(model, "model", model), "get_input_embeddings", lambda: None)()
    return None if embeddings is None else embeddings.weight.shape[0]


def _pretokenization(cfg: LanguageModelRunConfig) -> dict[str, Any]:
    path = Path(cfg.dataset_path).expanduser()
    file = (path if path.is_dir() else path.parent) / PRETOKENIZATION_FILENAME
    return read_json(file) if cfg.dataset_path and file.is_file() else {}


def _contradiction(cfg: LanguageModelRunConfig, field: str, recorded: str, remedy: Any) -> ConfigError:
    value = "null" if remedy is None else str(remedy).lower() if isinstance(remedy, bool) else remedy
    return ConfigError(
        f"{field}={getattr(cfg, field)!r}, but the {PRETOKENIZATION_FILENAME} of {cfg.dataset_path} speaks of "
        f"{recorded}; set {field}={value}, or tokenize the text anew."
    )


def _some_rows(store: ActivationsStore, cfg: LanguageModelRunConfig) -> tuple[pa.ChunkedArray, int]:
    """The tokens that are used of some rows, and how many rows it is from one to the next."""
    dataset, column = store.dataset, store.tokens_column
    n_rows, step = max(1, CHECKED_TOKENS // store.context_size), 1
    if isinstance(dataset, Dataset):
        step = -(-len(dataset) // n_rows)
        rows = dataset.select(range(0, len(dataset), step)).with_format("arrow")[:][column]
    else:
        assert isinstance(dataset, IterableDataset)
        if not Path(cfg.dataset_path).expanduser().exists():
            n_rows = CHECKED_HUB_ROWS
        batches = dataset.take(n_rows).iter(batch_size=1000)
        rows = pa.chunked_array([pa.array(batch[column]) for batch in batches])
    return pc.list_slice(rows, 0, store.context_size), step


def _check_ids(rows: pa.ChunkedArray, step: int, store: ActivationsStore, cfg: LanguageModelRunConfig) -> None:
    tokens, size = pc.list_flatten(rows), vocabulary_size(store.model)
    outside = pc.or_(pc.less(tokens, 0), pc.greater_equal(tokens, 2**31 if size is None else size))
    first = pc.index(pc.fill_null(outside, True), True).as_py()
    if first >= 0:
        row = first // store.context_size * step + 1
        raise ConfigError(
            f"Row {row} of {cfg.dataset_path} holds the token id {tokens[first]}, but "
            f"{cfg.model_name} has embeddings for {size} tokens; these are not its tokenizer's."
        )
    logger.info(
        f"The token ids of {len(rows):,} rows of {cfg.dataset_path} are within the model's vocabulary"
        f"{'' if size is None else f' of {size:,}'}; the others are looked at when they are read."
    )


def _check_tokenizer(name: str, tokenizer: Any, cfg: LanguageModelRunConfig) -> None:
    if name in (cfg.model_name, tokenizer.name_or_path):
        return
    try:
        vocabulary = AutoTokenizer.from_pretrained(name, trust_remote_code=False).get_vocab()
    except (OSError, ValueError) as error:
        reason = first_line(error)
        logger.warning(f"{cfg.dataset_path} was made by the tokenizer {name!r}, which cannot be compared ({reason}).")
        return
    if vocabulary != tokenizer.get_vocab():
        raise ConfigError(
            f"The {PRETOKENIZATION_FILENAME} of {cfg.dataset_path} names the tokenizer {name!r}, whose vocabulary is "
            f"not that of model_name={cfg.model_name!r}; tokenize the text anew with the model's."
        )


def _check_bos(made: dict[str, Any], rows: pa.ChunkedArray, tokenizer: Any, cfg: LanguageModelRunConfig) -> None:
    """``prepend_bos`` only says what tokens are like, but evaluations go by it."""
    bos = tokenizer.bos_token_id
    begin_with_bos = bos is not None and pc.all(pc.equal(pc.list_element(rows, 0), bos)).as_py()
    if bos is None or begin_with_bos == cfg.prepend_bos:
        return
    what = "all rows looked at begin" if begin_with_bos else "not all rows looked at begin"
    problem = (
        f"prepend_bos={cfg.prepend_bos}, but {what} with the BOS token {bos} in {cfg.dataset_path}; "
        f"set prepend_bos={str(begin_with_bos).lower()}"
    )
    first = made.get("begin_batch_token")
    if made.get("disable_concat_sequences") and made.get("begin_sequence_token") is not None:
        first = made["begin_sequence_token"]
    if "begin_batch_token" in made and (get_special_token_from_cfg(first, tokenizer) == bos) != cfg.prepend_bos:
        raise ConfigError(f"{problem}, or tokenize the text anew ({PRETOKENIZATION_FILENAME}: {first!r}).")
    logger.warning(f"{problem}.")
