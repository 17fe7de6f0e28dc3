"""Rows of a data file with their values as they stand: text stays text, and what cannot be used is named by its row.

``datasets`` and pandas guess types from what a file holds: ``NA`` becomes nothing, ``007`` the number 7, and files with
different columns do not go together. What SAEs are trained and evaluated on is read here instead.
"""

import csv
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset
from pyarrow.parquet import ParquetFile

from sae_lens_matryoshka.errors import UserError
from sae_lens_matryoshka.untrusted.bounded import load_json

Rows = Iterator[tuple[int, dict[str, Any]]]
"""Rows by column, each with its number from 1."""


def read_rows(path: str | Path, columns: Collection[str] | None = None) -> Rows:
    """The rows of a file, read as they are asked for.

    Args:
        path: The file; its ending says what it is, one of :data:`READERS`. The lines of a text file are rows with the
            column ``text``; rows of JSON Lines are numbered as lines.
        columns: Columns that are enough, where it saves time to leave out the others; None means all.

    Raises:
        UserError: If there is no such file, it is of another kind, or something in it cannot be read.
    """
    path = Path(path)
    if path.suffix not in READERS:
        raise UserError(f"{path} must be a file of one of the kinds {', '.join(READERS)}.")
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    try:
        yield from READERS[path.suffix](path, columns)
    except UserError:
        raise
    except (ValueError, OSError, csv.Error, pa.ArrowException) as error:  # bad UTF-8 and bad JSON are ValueErrors
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())[:300].rstrip('.')}.") from error


def check_text(value: Any, where: str) -> None:
    """Refuse what a tokenizer does not take as text.

    Args:
        value: What stands in the column of texts.
        where: Its place, as the sentence should name it.

    Raises:
        UserError: If it is not a string, or holds half of a character that takes two (a lone surrogate).
    """
    if not isinstance(value, str):
        raise UserError(
            f"{where} holds {shown(value)} where its text should be; write it as a string or remove the row."
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where} holds half a character, {value[error.start]!a}; remove it.") from error


def shown(value: Any) -> str:
    """A value as errors show it, in at most 60 characters."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _json_rows(path: Path, columns: Collection[str] | None) -> Rows:
    """An object a line, or one list of objects."""
    with path.open(encoding="utf-8-sig") as file:
        is_list = next((line for line in file if line.strip()), "").lstrip().startswith("[")
        file.seek(0)
        if is_list:
            rows = enumerate(load_json(file.read()), 1)
        else:
            rows = ((number, _parse(line, number, path)) for number, line in enumerate(file, 1) if line.strip())
        for number, row in rows:
            if not isinstance(row, dict):
                raise UserError(f"Row {number} of {path} is {shown(row)} instead of an object with a key a column.")
            yield number, row


def _parse(line: str, number: int, path: Path) -> Any:
    try:
        return load_json(line)
    except ValueError as error:
        raise UserError(f"Row {number} of {path} is not JSON: {error}.") from error


def _csv_rows(path: Path, columns: Collection[str] | None, delimiter: str = ",") -> Rows:
    csv.field_size_limit(2**31 - 1)  # Python's own limit, for the whole process, is 131,072 characters a text
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        names = next(reader, [])
        if len(set(names)) < len(names):
            raise UserError(f"Two columns of {path} have the same name: {', '.join(names)}.")
        for number, cells in enumerate(filter(None, reader), 1):  # without empty lines
            if len(cells) != len(names):
                raise UserError(f"Row {number} of {path} has {len(cells)} cells, but there are {len(names)} columns.")
            yield number, dict(zip(names, cells, strict=True))


def _parquet_rows(path: Path, columns: Collection[str] | None) -> Rows:
    with ParquetFile(path) as file:
        batches = file.iter_batches(batch_size=1000, columns=None if columns is None else list(columns))
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)


def _arrow_rows(path: Path, columns: Collection[str] | None) -> Rows:
    dataset = Dataset.from_file(str(path))
    kept = dataset.column_names if columns is None else [name for name in dataset.column_names if name in columns]
    for number, row in enumerate(dataset.select_columns(kept), 1):
        assert isinstance(row, dict)
        yield number, row


def _text_rows(path: Path, columns: Collection[str] | None) -> Rows:
    with path.open(encoding="utf-8-sig") as file:
        yield from ((number, {"text": line.rstrip("\n")}) for number, line in enumerate(file, 1))


READERS: dict[str, Callable[[Path, Collection[str] | None], Rows]] = {
    ".jsonl": _json_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".tsv": partial(_csv_rows, delimiter="\t"),
    ".parquet": _parquet_rows,
    ".arrow": _arrow_rows,
    ".txt": _text_rows,
}
"""What reads a file, by its ending."""
