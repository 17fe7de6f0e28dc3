"""The data set of a run where it lies on this machine: a file, a folder of files, or what ``save_to_disk`` has left.

SAELens hands ``dataset_path`` to ``datasets.load_dataset``, which takes no single files and no saved data sets, and
wants the same columns in all files of a folder; for tokens SAELens then asks the Hub about the folder. Here the one
column to train on is read, every value is looked at, and SAELens is given the data set. Names on the Hub stay with it.
"""

import glob
import os
from collections.abc import Callable, Collection, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute
from datasets import Dataset, DatasetDict, Features, IterableDataset, Sequence, Value, load_dataset_builder
from datasets import load_from_disk as load_saved_data_set
from datasets.config import DATASET_STATE_JSON_FILENAME, DATASETDICT_JSON_FILENAME
from datasets.exceptions import DatasetGenerationError

from sae_lens_matryoshka.errors import ConfigError, UserError
from sae_lens_matryoshka.run_files.building import LanguageModelRunConfig
from sae_lens_matryoshka.text.data_files import READERS, check_text, read_rows, shown
from sae_lens_matryoshka.text.token_data import PRETOKENIZATION_FILENAME, check_pretokenization

pc: Any = pyarrow.compute  # it makes its functions when it is imported, unseen by type checkers

TOKEN_COLUMNS = ("tokens", "input_ids")
TEXT_COLUMNS = ("text", "problem")
CHAT_COLUMNS = ("conversation", "conversations", "messages", "text")
"""Columns that SAELens reads, the first there is; those for chats with ``use_chat_formatting``."""

CHECKED_ROWS = 10_000
"""How many rows of a streamed data set are looked at before a model is loaded; the others are as they are read."""


def open_data_set(cfg: LanguageModelRunConfig) -> Dataset | IterableDataset | None:
    """The run's data set, if it lies on this machine in a form that is read here; None leaves it to SAELens.

    With ``streaming``, files are read while training. Otherwise the column to train on is first copied into the cache
    of ``datasets``, with a look at every value. What ``save_to_disk`` has left is used where it lies, either way.

    Args:
        cfg: The run; its ``dataset_path`` is a file, a folder or a name.

    Raises:
        UserError: If the data set cannot be used. The sentence names file and row, where it is about a row.
    """
    path = Path(cfg.dataset_path).expanduser()
    if not cfg.dataset_path or not path.exists():
        return None
    if any((path / name).is_file() for name in (DATASET_STATE_JSON_FILENAME, DATASETDICT_JSON_FILENAME)):
        return _saved(path, cfg)
    files = _files(path)
    if files is None:
        return None
    column = _column_of_files(files, cfg.use_chat_formatting)
    if column in TOKEN_COLUMNS:
        check_pretokenization(cfg)
    check = value_check(column, cfg.use_chat_formatting, cfg.context_size)
    arguments = {"files": files, "column": column, "check": check}
    if cfg.streaming:
        dataset = IterableDataset.from_generator(_rows, gen_kwargs=arguments)
        for _ in islice(dataset, CHECKED_ROWS):
            pass
        return dataset
    # a copy under the same name may bring its old time of writing along, as tar and rsync do
    arguments["versions"] = tuple((s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for s in map(os.stat, files))
    feature = Sequence(Value("int32")) if column in TOKEN_COLUMNS else Value("string")
    features = None if cfg.use_chat_formatting else Features({column: feature})  # chats are as the rows have them
    try:
        dataset = Dataset.from_generator(_rows, features, gen_kwargs=arguments)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from error
        reason = " ".join(str(error.__cause__ or error).split()).rstrip(".")
        raise ConfigError(
            f"{path} cannot be copied into the cache of data sets ({reason}); try streaming=true."
        ) from error
    assert isinstance(dataset, Dataset)
    return dataset


def open_text_file(path: str | Path) -> IterableDataset:
    """The texts of a file, streamed.

    Raises:
        UserError: If there is no such file, or it holds no texts.
    """
    column = _column_of_files([str(path)], use_chat_formatting=False)
    return IterableDataset.from_generator(
        _rows, gen_kwargs={"files": [str(path)], "column": column, "check": value_check(column, False, context_size=1)}
    )


def _check_tokens(value: Any, where: str, context_size: int) -> None:
    """Refuse what is no row of token ids, or one that is shorter than the context."""
    if not isinstance(value, list) or set(map(type, value)) != {int}:
        raise UserError(f"{where} holds {shown(value)} where a list of token ids should be.")
    if len(value) < context_size:
        raise UserError(
            f"{where} has {len(value)} tokens, fewer than context_size={context_size}; lower it, or join the rows."
        )
    if min(value) < 0 or max(value) >= 2**31:
        raise UserError(f"{where} holds {min(value) if min(value) < 0 else max(value)}, which is no token id.")


def _files(path: Path) -> list[str] | None:
    """The files to train on, in the order of ``datasets``; None if there are some that are not read here."""
    if path.is_file():
        return [str(path.resolve())]
    if (path / f"{path.name}.py").is_file():
        return None  # a script that loads a data set
    if glob.escape(str(path.resolve())) != str(path.resolve()):
        raise ConfigError(f"dataset_path={str(path)!r} is a pattern to datasets, for its *, ? or [; rename the folder.")
    try:
        data_files = load_dataset_builder(str(path)).config.data_files or {}
    except FileNotFoundError as error:
        raise ConfigError(f"dataset_path={str(path)!r} holds no data files ({', '.join(READERS)}).") from error
    except ValueError:
        return None  # what only SAELens's call can say, such as several configurations
    if "train" not in data_files:
        raise ConfigError(
            f"dataset_path={str(path)!r} has no split 'train' to train on, only {', '.join(map(str, data_files))}."
        )
    files = [str(file) for file in data_files["train"] if Path(file).name != PRETOKENIZATION_FILENAME]
    return files if all(Path(file).suffix in READERS and Path(file).is_file() for file in files) else None


def _column_of_files(files: list[str], use_chat_formatting: bool) -> str:
    for file in files:
        for _, row in read_rows(file):
            return _column(row, file, use_chat_formatting)
    raise ConfigError(f"There are no rows in {', '.join(files[:3])}{', ...' if len(files) > 3 else ''}.")


def _column(columns: Collection[str], where: str, use_chat_formatting: bool) -> str:
    wanted = CHAT_COLUMNS if use_chat_formatting else (*TOKEN_COLUMNS, *TEXT_COLUMNS)
    for name in wanted:
        if name in columns:
            return name
    raise ConfigError(
        f"{where} has none of the columns {', '.join(wanted)}, but {', '.join(columns)}; rename the one to train on."
    )


def value_check(column: str, use_chat_formatting: bool, context_size: int) -> Callable[[Any, str], None]:
    """What refuses a value that cannot be used, given its place.

    Args:
        column: The column that is trained on.
        use_chat_formatting: Whether it holds conversations.
        context_size: How many tokens a row of tokens must have.
    """
    if use_chat_formatting:
        return _check_chat
    return partial(_check_tokens, context_size=context_size) if column in TOKEN_COLUMNS else check_text


def _check_chat(value: Any, where: str) -> None:
    if not isinstance(value, list):
        check_text(value, where)


def _rows(
    files: list[str], column: str, check: Callable[[Any, str], None], versions: tuple[tuple[int, ...], ...] = ()
) -> Iterator[dict[str, Any]]:
    """The rows of files, with one column; a list of files is what ``datasets`` shuffles and counts its position in.

    The files' times and sizes are for the cache of ``datasets``, which takes equal arguments for equal rows.
    """
    for file in files:
        for number, row in read_rows(file, [column]):
            value = row.get(column)
            check(value, f"Row {number} of {file}")
            yield {column: value}


def _saved(path: Path, cfg: LanguageModelRunConfig) -> Dataset:
    """What ``save_to_disk`` has left, with the column to train on as plain Python values."""
    try:
        dataset = load_saved_data_set(str(path))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ConfigError(f"The data set saved at {path} cannot be read: {reason}.") from error
    if isinstance(dataset, DatasetDict):
        if "train" not in dataset:
            raise ConfigError(
                f"dataset_path={str(path)!r} has no split 'train' to train on, only {', '.join(dataset)}."
            )
        dataset = dataset["train"]
    if len(dataset) == 0:
        raise ConfigError(f"There are no rows in {path}.")
    column = _column(dataset.column_names, str(path), cfg.use_chat_formatting)
    if column in TOKEN_COLUMNS:
        check_pretokenization(cfg)
    dataset = dataset.with_format(None).select_columns([column])
    if not cfg.use_chat_formatting:
        _check_saved(dataset.data.column(column), column, path, cfg.context_size)
    return dataset


def _check_saved(values: pa.ChunkedArray, column: str, path: Path, context_size: int) -> None:
    """Look at all values of a column at once; a mapped file of millions of rows takes a second."""
    of_tokens, kind = column in TOKEN_COLUMNS, values.type
    if of_tokens:
        is_usable = pa.types.is_nested(kind) and pa.types.is_integer(getattr(kind, "value_type", pa.null()))
    else:
        is_usable = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if not is_usable:
        expected = "lists of token ids" if of_tokens else "text"
        raise ConfigError(f"The column {column!r} of {path} holds {kind}, not {expected}.")
    problems = {"is null": pc.is_null(values)}
    if of_tokens:
        too_short = pc.less(pc.list_value_length(values), context_size)
        problems[f"has fewer tokens than context_size={context_size}; lower it, or join the rows"] = too_short
    for problem, rows in problems.items():
        row = pc.index(rows, True).as_py()
        if row >= 0:
            raise ConfigError(f"Row {row + 1} of {path} {problem}.")
