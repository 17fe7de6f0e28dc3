"""A cache for what all SAEs share: named by a hash of what went in, safe to interrupt and to share, bounded.

An entry is one safetensors file, its small values in the header as JSON, and beside it a JSON file that says in words
what it was made from. Nothing is ever unpickled, and no file is touched whose name the cache cannot have given.
"""

import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sae_lens_matryoshka.saved.fingerprints import content_hash

logger = logging.getLogger(__name__)

VALUES = "values"
DEFAULT_BYTES = 50 * 10**9

_STAGING_PREFIX = ".writing-"
_SECONDS_TO_WRITE = 3600.0
"""How long after its last change an unfinished entry is that of a process that was killed."""


@dataclass(frozen=True)
class Entry:
    """What the cache keeps under one key."""

    tensors: dict[str, Tensor]
    values: dict[str, Any] = field(default_factory=dict)
    """Whatever else there is, as JSON can hold it."""

    @property
    def n_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


class Cache:
    """Entries in a folder, or in memory where no folder is named. The least recently used make room for new ones.

    Several processes may share a folder. Where it cannot be written, what is found there is used all the same.

    Args:
        folder: Where to keep entries; None keeps them in the host's memory only, for as long as this object lives.
        max_bytes: What all entries together may take. An entry larger than that is returned, not kept. In memory it is
            never more than half of what is free when the cache is made.
    """

    def __init__(self, folder: str | Path | None = None, max_bytes: int = DEFAULT_BYTES) -> None:
        self.folder = None if folder is None else Path(folder)
        in_memory = min(max_bytes, psutil.virtual_memory().available // 2)
        self.max_bytes = in_memory if folder is None else max_bytes
        self._in_memory: OrderedDict[str, Entry] = OrderedDict()
        self._cannot_write = False

    def get_or_compute(self, key: Mapping[str, Any], compute: Callable[[], Entry]) -> Entry:
        """The entry made from ``key``, computed if it is not there, or not readable.

        Args:
            key: Everything that the entry depends on, as JSON can hold it.
            compute: Makes the entry.
        """
        name = content_hash(key)
        entry = self._in_memory.get(name) if self.folder is None else self._read(self.folder, name)
        if entry is None:
            entry = compute()
            if entry.n_bytes <= self.max_bytes:
                self._keep(name, key, entry)
        elif self.folder is None:
            self._in_memory.move_to_end(name)
        return entry

    @property
    def n_bytes(self) -> int:
        """What the entries take."""
        if self.folder is None:
            return sum(entry.n_bytes for entry in self._in_memory.values())
        return sum(size for _, size, _ in _entries(self.folder))

    def __str__(self) -> str:
        where = "memory" if self.folder is None else str(self.folder)
        return f"Cache in {where}: {self.n_bytes / 10**9:.2f} GB of at most {self.max_bytes / 10**9:.0f} GB"

    def _read(self, folder: Path, name: str) -> Entry | None:
        path = folder / f"{name}.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                metadata: dict[str, str] = file.metadata() or {}
                entry = Entry({key: file.get_tensor(key) for key in file.keys()}, json.loads(metadata[VALUES]))  # noqa: SIM118
        # absent, evicted meanwhile (a RuntimeError while it is being opened), or damaged
        except (OSError, RuntimeError, SafetensorError, KeyError, ValueError):
            return None
        with suppress(OSError):
            os.utime(path)
        return entry

    def _keep(self, name: str, key: Mapping[str, Any], entry: Entry) -> None:
        if self.folder is None:
            while self._in_memory and self.n_bytes + entry.n_bytes > self.max_bytes:
                self._in_memory.popitem(last=False)
            # the model's device has better uses for its memory
            self._in_memory[name] = Entry({key: t.cpu() for key, t in entry.tensors.items()}, entry.values)
            return
        try:
            _make_room(self.folder, self.max_bytes - entry.n_bytes)
            _write(self.folder, name, key, entry)
        except (OSError, SafetensorError) as error:  # safetensors' own error where a disk is full
            if not self._cannot_write:
                logger.warning(f"The cache in {self.folder} cannot be written ({error}); going on without.")
            self._cannot_write = True


def _write(folder: Path, name: str, key: Mapping[str, Any], entry: Entry) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=_STAGING_PREFIX) as staging:
        written = Path(staging) / "entry"
        tensors = {name: tensor.contiguous() for name, tensor in entry.tensors.items()}
        save_file(tensors, written, metadata={VALUES: json.dumps(entry.values)})
        written.replace(folder / f"{name}.safetensors")
        written.write_text(json.dumps(key, indent=2), encoding="utf-8")
        written.replace(folder / f"{name}.json")


def _make_room(folder: Path, n_bytes: int) -> None:
    """Remove what killed processes have left, and the least recently used entries until the others fit."""
    for staging in folder.glob(f"{_STAGING_PREFIX}*"):
        with suppress(OSError):
            newest = max(path.stat().st_mtime for path in [staging, *staging.iterdir()])
            if time.time() - newest > _SECONDS_TO_WRITE:
                shutil.rmtree(staging)
    entries = sorted(_entries(folder))
    total = sum(size for _, size, _ in entries)
    for _, size, path in entries:
        if total <= n_bytes:
            break
        total -= size
        path.unlink(missing_ok=True)
        path.with_suffix(".json").unlink(missing_ok=True)


def _entries(folder: Path) -> Iterator[tuple[float, int, Path]]:
    """When each entry was last used, its bytes and its file; of files that the cache can have written."""
    for path in folder.glob("*.safetensors"):
        if re.fullmatch(r"[0-9a-f]{32}", path.stem):
            with suppress(FileNotFoundError):  # another process has evicted it
                stat = path.stat()
                yield stat.st_mtime, stat.st_size, path
