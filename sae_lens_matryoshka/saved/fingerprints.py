"""Names for content, equal for equal content only: of weights, files and SAEs, every byte of which counts."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors.torch import load_file
from torch import Tensor, nn

from sae_lens_matryoshka.saved.checks import WEIGHTS_FILENAME, read_config


def content_hash(content: Mapping[str, Any] | Sequence[Any] | str) -> str:
    """A name for what JSON can hold."""
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True, ensure_ascii=False).encode())


def tensors_hash(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A name for tensors, given with their names: those, their shapes, types and every byte of them."""
    described: list[Any] = []
    for name, tensor in sorted(tensors, key=lambda named: named[0]):
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        described.append([name, list(tensor.shape), str(tensor.dtype), xxhash.xxh3_128_hexdigest(data.data)])
    return content_hash(described)


def module_hash(module: nn.Module) -> str:
    """A name for all parameters and buffers of a module."""
    return tensors_hash(module.state_dict().items())


def sae_hash(sae: Any) -> str:
    """A name for what an SAE, or a level cut out of one, computes: its parameters and settings, not its origin."""
    settings = {name: str(value) for name, value in sae.cfg.to_dict().items() if name not in _ELSEWHERE}
    return content_hash([module_hash(sae), settings])


def typed_hash(sae: Any) -> str:
    """The data type that an SAE is in, and :func:`sae_hash` after a colon: the same SAE can be loaded in several."""
    return f"{str(sae.dtype).removeprefix('torch.')}:{sae_hash(sae)}"


def file_hash(path: Path) -> str:
    """A name for the contents of a file.

    Raises:
        OSError: If it cannot be read.
    """
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def saved_sae_hash(folder: Path) -> str:
    """A name for what a saved SAE computes: the tensors of its weights file, and the settings beside it.

    Raises:
        UserError: If its config cannot be read.
        OSError, SafetensorError: If its weights cannot be read.
    """
    settings = {name: value for name, value in read_config(folder).items() if name not in _ELSEWHERE}
    return content_hash([tensors_hash(load_file(folder / WEIGHTS_FILENAME).items()), settings])


_ELSEWHERE = ("metadata", "device", "dtype")
"""Settings of an SAE that say nothing of what it computes; its data type is that of its parameters."""
