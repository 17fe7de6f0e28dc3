"""A cache for what all SAEs share: named by a hash of what went in, safe to interrupt, bounded.

An entry is one safetensors file, its small values in the header as JSON, and beside it a JSON file that says in words
what it was made from. Nothing is ever unpickled.
"""

import hashlib
import json
import os
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

VALUES = "values"


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

    Args:
        folder: Where to keep entries; None keeps them in memory only, for as long as this object lives.
        max_bytes: What all entries together may take. An entry larger than that is returned, not kept.
    """

    def __init__(self, folder: str | Path | None = None, max_bytes: int = 50 * 10**9) -> None:
        self.folder = None if folder is None else Path(folder)
        self.max_bytes = max_bytes
        self._in_memory: OrderedDict[str, Entry] = OrderedDict()

    def get_or_compute(self, key: Mapping[str, Any], compute: Callable[[], Entry]) -> Entry:
        """The entry made from ``key``, computed if it is not there, or not readable.

        Args:
            key: Everything that the entry depends on, as JSON can hold it.
            compute: Makes the entry.
        """
        name = content_hash(key)
        entry = self._read(name)
        if entry is None:
            entry = compute()
            self._write(name, key, entry)
        return entry

    @property
    def n_bytes(self) -> int:
        """What the entries take."""
        if self.folder is None:
            return sum(entry.n_bytes for entry in self._in_memory.values())
        return sum(path.stat().st_size for path in self._files())

    def __str__(self) -> str:
        where = "memory" if self.folder is None else str(self.folder)
        return f"Cache in {where}: {self.n_bytes / 10**9:.2f} GB of at most {self.max_bytes / 10**9:.0f} GB"

    def _read(self, name: str) -> Entry | None:
        if self.folder is None:
            if name in self._in_memory:
                self._in_memory.move_to_end(name)
            return self._in_memory.get(name)
        path = self.folder / f"{name}.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                metadata: dict[str, str] = file.metadata() or {}
                entry = Entry({key: file.get_tensor(key) for key in file.keys()}, json.loads(metadata[VALUES]))  # noqa: SIM118
            os.utime(path)
        except (FileNotFoundError, SafetensorError, KeyError):
            return None
        return entry

    def _write(self, name: str, key: Mapping[str, Any], entry: Entry) -> None:
        if entry.n_bytes > self.max_bytes:
            return
        self._make_room(entry.n_bytes)
        if self.folder is None:
            self._in_memory[name] = entry
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=".writing-") as staging:
            written = Path(staging) / "entry"
            tensors = {name: tensor.contiguous() for name, tensor in entry.tensors.items()}
            save_file(tensors, written, metadata={VALUES: json.dumps(entry.values)})
            written.rename(self.folder / f"{name}.safetensors")
            written.write_text(json.dumps(key, indent=2), encoding="utf-8")
            written.rename(self.folder / f"{name}.json")

    def _make_room(self, n_bytes: int) -> None:
        if self.folder is None:
            while self._in_memory and self.n_bytes + n_bytes > self.max_bytes:
                self._in_memory.popitem(last=False)
            return
        total = self.n_bytes
        for path in sorted(self._files(), key=lambda path: path.stat().st_mtime):
            if total + n_bytes <= self.max_bytes:
                break
            total -= path.stat().st_size
            path.unlink(missing_ok=True)
            path.with_suffix(".json").unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        if self.folder is None or not self.folder.is_dir():
            return []
        return list(self.folder.glob("*.safetensors"))


def content_hash(content: Mapping[str, Any] | Sequence[Any] | str) -> str:
    """A name for ``content``, equal for equal content only."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def module_hash(module: nn.Module, samples_a_parameter: int = 4096) -> str:
    """A name for the parameters of a module: their names, shapes, types and some thousand evenly spaced values of each.

    Not every value is read, so that naming a model of some gigabytes takes no time.
    """
    described: list[Any] = []
    for name, parameter in sorted(module.state_dict().items()):
        values = parameter.detach().reshape(-1)
        values = values[:: max(1, values.numel() // samples_a_parameter)].double().cpu()
        digest = hashlib.sha256(values.numpy().tobytes()).hexdigest()
        described.append([name, list(parameter.shape), str(parameter.dtype), digest])
    return content_hash(described)
