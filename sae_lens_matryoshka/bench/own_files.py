"""Keeping off the user's files in an output: table and figures there are replaced only where they are our own."""

from collections.abc import Iterable
from pathlib import Path

from sae_lens_matryoshka.bench.figures import BY_L0_FILENAME, BY_WIDTH_FILENAME, FIGURE_MARK
from sae_lens_matryoshka.bench.results import COLUMNS
from sae_lens_matryoshka.errors import UserError

RESULTS_FILENAME = "results.csv"
OWN_FILENAMES = (RESULTS_FILENAME, BY_WIDTH_FILENAME, BY_L0_FILENAME)
"""The files that every call writes anew, or removes where it has nothing to show."""

_COLUMNS_ONCE = b"sae,level,width,evaluation,metric,value,l0,weights"
"""What the table's first line was before there were standard errors."""

_PNG_HEADER_BYTES = 1000
"""Where the text that says what a figure was made with ends at the latest: matplotlib writes it first."""


def check_own_files(output: Path, folders: Iterable[str]) -> None:
    """Refuse an output with files of somebody else's where ours would be.

    Args:
        output: The folder.
        folders: The names of the folders of results in it.

    Raises:
        UserError: If it is a file, something else has the name of our table or a figure, or a file that of a folder.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"The output {output} is a file; name a folder.")
    for folder in folders:
        check_folder(output / folder)
    for name in OWN_FILENAMES:
        path = output / name
        if (path.exists() or path.is_symlink()) and not _is_own(path):
            raise UserError(
                f"{path} was not written by evaluate, which would replace it; move it away, or choose another output."
            )


def check_folder(folder: Path) -> None:
    """Refuse a file where a folder of results would be.

    Raises:
        UserError: If it is one.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, but results go to a folder of that name; choose another output.")


def _is_own(path: Path) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(_PNG_HEADER_BYTES)
    if path.name != RESULTS_FILENAME:
        return FIGURE_MARK.encode() in head
    columns = head.splitlines()[:1]
    return columns in ([",".join(COLUMNS).encode()], [_COLUMNS_ONCE])
