"""One shard of an activation cache: a safetensors file that is complete or absent, and is read without being loaded.

It holds the activations of each hook under its name, (rows, d_in), the ``tokens`` of the sequences that they come from,
(sequences, context_size), and which of these were ``kept``: the r-th kept token, counted row by row, is that of row r.
"""

import json
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sae_lens_matryoshka.activation_cache.manifest import Manifest, ShardRecord, shard_path
from sae_lens_matryoshka.errors import UserError
from sae_lens_matryoshka.saved.fingerprints import file_hash

TOKENS, KEPT = "tokens", "kept"

_SAFETENSORS_NAMES = {"bfloat16": "BF16", "float32": "F32"}
_TYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "I32": torch.int32, "BOOL": torch.bool}


def write_shard(
    path: Path,
    activations: Mapping[str, Float[Tensor, "rows d_in"]],
    tokens: Int[Tensor, "sequences context_size"],
    kept: Bool[Tensor, "sequences context_size"],
) -> ShardRecord:
    """Write a shard, which then is on disk as a whole, and say what the manifest should know of it.

    Raises:
        OSError, SafetensorError: If it cannot be written; nothing carries its name then.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        save_file({**activations, TOKENS: tokens.int(), KEPT: kept}, partial)
        partial.chmod(0o644)  # safetensors makes it private
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        checksum = file_hash(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return ShardRecord(int(kept.sum()), len(tokens), path.stat().st_size, checksum)


def check_shard(folder: Path, number: int, manifest: Manifest) -> None:
    """Refuse a shard whose file is not what the manifest says, by its size and its header.

    Raises:
        UserError: If it is not.
    """
    path, record = shard_path(folder, number), manifest.shards[number]
    sequences = (record.n_sequences, manifest.made_from["context_size"])
    expected = {
        **{hook: (_SAFETENSORS_NAMES[manifest.dtype], (record.n_rows, d_in)) for hook, d_in in manifest.d_in.items()},
        TOKENS: ("I32", sequences),
        KEPT: ("BOOL", sequences),
    }
    try:
        n_bytes = path.stat().st_size
        if n_bytes != record.n_bytes:
            raise UserError(f"{path} has {n_bytes:,} bytes, not {record.n_bytes:,}: it is cut off or another's")
        with safe_open(path, "pt") as file:
            found = {}
            for name in file.keys():  # noqa: SIM118 it is no mapping
                part = file.get_slice(name)
                found[name] = (part.get_dtype(), tuple(part.get_shape()))
        for name, described in expected.items():
            if found.get(name) != described:
                raise UserError(f"{path} holds {found.get(name)} as {name}, not {described}")
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error})") from error


class MappedShard:
    """The tensors of a shard as they lie in its file: pages are read when they are touched.

    safetensors maps files too, but gives nobody the mapping, and the system reads 128 kB around every page that is
    touched: a hundred times the row that was wanted.

    Args:
        path: The file, which :func:`check_shard` has looked at.
        is_sparsely_read: Whether only what is touched should be read.
    """

    def __init__(self, path: Path, is_sparsely_read: bool = False) -> None:
        self.path = path
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # writable for torch; nothing is written
        if is_sparsely_read and hasattr(mmap, "MADV_RANDOM"):
            mapped.madvise(mmap.MADV_RANDOM)
        n_header = int.from_bytes(mapped[:8], "little")
        header: dict[str, Any] = json.loads(mapped[8 : 8 + n_header])
        self._mapped = mapped
        self._tensors = {
            name: torch.frombuffer(
                mapped,
                dtype=_TYPES[part["dtype"]],
                offset=8 + n_header + part["data_offsets"][0],
                count=part["shape"][0] * part["shape"][1],
            ).view(part["shape"])
            for name, part in header.items()
            if name != "__metadata__"
        }

    def __getitem__(self, name: str) -> Tensor:
        """A tensor, to be read at once: what is read of a file that has been cut off meanwhile kills the process.

        Raises:
            UserError: If the file has been cut off by now.
        """
        if self._mapped.size() < len(self._mapped):  # the size of the file, asked of the system in a microsecond
            raise UserError(
                f"{self.path} has been cut off to {self._mapped.size():,} bytes of {len(self._mapped):,} while it was "
                f"read; copy the activation cache again, or remove it and cache anew"
            )
        return self._tensors[name]
