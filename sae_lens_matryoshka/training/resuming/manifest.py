"""The list of a checkpoint's files with their digests, by which a damaged checkpoint is told from a whole one."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from sae_lens_matryoshka.untrusted.bounded import load_json

MANIFEST_FILENAME = "checkpoint.json"


def write_manifest(folder: Path) -> int:
    """Write the list of the files in a folder and make sure that everything is on disk.

    Returns:
        The size of all files in bytes.

    Raises:
        OSError: If a file cannot be read or written.
    """
    files = {str(path.relative_to(folder)): _describe(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    manifest = folder / MANIFEST_FILENAME
    manifest.write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")
    for path in [manifest, *(folder / name for name in files)]:
        _flush(path)
    flush_folder(folder)
    return sum(description["bytes"] for description in files.values()) + manifest.stat().st_size


def find_damage(folder: Path, read_contents: bool = True) -> str | None:
    """What is wrong with the files of a checkpoint that has a list of them, in a few words; None if nothing is.

    Args:
        folder: The checkpoint.
        read_contents: Whether the files are read, or only looked at for being there in their size.
    """
    try:
        files = load_json((folder / MANIFEST_FILENAME).read_text(encoding="utf-8"))["files"]
        for name, expected in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, not {expected['bytes']}"
            if read_contents and _describe(path) != expected:
                return f"the contents of {name} have changed"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST_FILENAME} cannot be read ({type(error).__name__}: {error})"
    return None


def flush_folder(folder: Path) -> None:
    """Make sure that a folder's entries are on disk, where the system can."""
    if os.name == "posix":
        _flush(folder)


def _describe(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
