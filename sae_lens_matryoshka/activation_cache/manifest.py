"""The manifest of an activation cache: what its activations were made from, and the shards that hold them."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from sae_lens_matryoshka.errors import UserError
from sae_lens_matryoshka.untrusted.bounded import load_json

MANIFEST_FILENAME = "manifest.json"
FORMAT = "sae-lens-matryoshka activations 1"

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
"""Types in which activations are kept, by the name that the manifest has for them."""


@dataclass(frozen=True)
class ShardRecord:
    """What the manifest says of one shard."""

    n_rows: int
    """Activations in it."""

    n_sequences: int
    """Sequences of ``context_size`` tokens that these come from."""

    n_bytes: int
    """The size of its file."""

    xxh3_128: str
    """The checksum of its file."""


@dataclass(frozen=True)
class Manifest:
    """What an activation cache is, finished or not."""

    made_from: Mapping[str, Any]
    """The run's fields that decide on the activations; see :func:`made_from`."""

    n_wanted: int
    """How many activations were asked for."""

    store_batch_size_prompts: int
    """Sequences that the model reads at a time: they decide on the rounding, and on where shards end."""

    shard_bytes: int
    """A shard ends with the batch that reaches this size."""

    dtype: str
    """The type of the activations, one of :data:`DTYPES`."""

    shards: tuple[ShardRecord, ...] = ()
    """Its shards, each complete."""

    finished: bool = False
    """Whether all that was asked for is there, or the text has ended."""

    text_ended: bool = False
    """Whether the text has ended before ``n_wanted`` activations."""

    versions: Mapping[str, str] = field(
        default_factory=lambda: {name: version(name) for name in ("sae-lens", "transformers", "torch")}
    )
    """The releases that it was begun with."""

    @property
    def n_rows(self) -> int:
        return sum(shard.n_rows for shard in self.shards)

    @property
    def d_in(self) -> dict[str, int]:
        """The width of each hook, in the order in which a shard holds them."""
        return {hook: fields["d_in"] for hook, fields in self.made_from["hooks"].items()}

    @property
    def row_bytes(self) -> int:
        """What the activations of one token take."""
        return sum(self.d_in.values()) * DTYPES[self.dtype].itemsize


def shard_path(folder: Path, number: int) -> Path:
    """The file of a shard, by its number from 0."""
    return folder / f"shard-{number:05d}.safetensors"


def is_activation_cache(folder: Path) -> bool:
    """Whether a folder is an activation cache of this package, finished or not."""
    return (folder / MANIFEST_FILENAME).is_file()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a manifest, which is then the new one or as it was.

    Raises:
        OSError: If it cannot be written.
    """
    partial = folder / f".{MANIFEST_FILENAME}.partial"
    with partial.open("w", encoding="utf-8") as file:
        json.dump({"format": FORMAT, **asdict(manifest)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / MANIFEST_FILENAME)


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of an activation cache.

    Raises:
        UserError: If there is none, or it is not one of this version.
    """
    path = folder / MANIFEST_FILENAME
    try:
        contents = load_json(path.read_text(encoding="utf-8"))
        written_as = contents.pop("format")
        if written_as != FORMAT:
            raise UserError(f"{path} is of the format {written_as!r}, not {FORMAT!r}; cache the activations anew.")
        manifest = Manifest(**{**contents, "shards": tuple(ShardRecord(**shard) for shard in contents["shards"])})
        counts = [n for shard in manifest.shards for n in (shard.n_rows, shard.n_sequences, shard.n_bytes)]
        counts += [*manifest.d_in.values(), manifest.n_wanted, manifest.made_from["context_size"]]
        counts += [len(manifest.shards)] if manifest.finished else []
        if not all(isinstance(n, int) and n > 0 for n in counts) or manifest.dtype not in DTYPES:
            raise ValueError("a number or type in it cannot be")
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(
            f"{folder} is no activation cache: it has no {MANIFEST_FILENAME}; make one with sae-lens-matryoshka cache."
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({error}); cache the activations anew.") from error
    return manifest
