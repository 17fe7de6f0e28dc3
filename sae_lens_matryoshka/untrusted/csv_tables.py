"""Tables as CSV files, in which no name is a formula.

Spreadsheets compute cells that begin with ``=`` and the like, and a name in a table can be somebody else's. Such a cell
is written with an apostrophe in front, which spreadsheets take for text, and read here as it was.
"""

import csv
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from sae_lens_matryoshka.errors import UserError

_FORMULA = "=+-@\t\r\n＝＋－＠"  # noqa: RUF001 some spreadsheets take the wide ones too


def as_text(cell: Any) -> Any:
    """A cell as it is written: numbers as they are, text so that no program takes it for a formula."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith((*_FORMULA, "'")) else cell


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with the same keys as a table, which is then complete or as it was."""
    partial = partial_file(path)
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows({key: as_text(cell) for key, cell in row.items()} for row in rows)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def partial_file(path: Path) -> Path:
    """Where a table is written before it has its name; only a killed process, or a full disk, leaves that."""
    return path.with_name(f".{path.name}.partial")


def read_csv(path: Path, needed: Collection[str] = ()) -> list[dict[str, str]]:
    """The rows of a table by column, with text as it was before it was written.

    Raises:
        UserError: If it cannot be read, or lacks a column of ``needed``.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows = [{key: _unquoted(cell or "") for key, cell in row.items() if key} for row in reader]
            columns = reader.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    missing = [column for column in needed if column not in columns]
    if missing:
        raise UserError(f"{path} has no column {' and no column '.join(missing)}.")
    return rows


def _unquoted(cell: str) -> str:
    return cell[1:] if re.match(f"'[{re.escape(_FORMULA)}']", cell) else cell
