"""Files that are published as they are: each lies in the folder that the user named, and is what its name says.

A link can lead to any file of this machine, and a file can hold more than is seen of it. So links out of the folder
are refused, figures are published without the texts that programs write into them, and of safetensors the tensors are.
"""

import struct
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file

from sae_lens_matryoshka.errors import UserError

MAX_BYTES = 20_000_000
"""The size up to which figures, tables and configs are published."""


def check_own_file(path: Path, folder: Path, max_bytes: int | None = MAX_BYTES) -> Path:
    """Refuse a file that is somewhere else, or too large for what it should be (``max_bytes``, None for any size).

    Raises:
        UserError: If it is a link out of the folder, not a file, or too large.
    """
    target = path.resolve()
    if not target.is_relative_to(folder.resolve()):
        raise UserError(f"{path} is a link to what lies outside {folder}; copy it into the folder, or remove the link.")
    if not target.is_file():
        raise UserError(f"{path} is not a file; remove it.")
    if max_bytes is not None and target.stat().st_size > max_bytes:
        raise UserError(f"{path} has more than {max_bytes // 1_000_000} MB, too much for what it should be.")
    return path


def read_png(path: Path) -> bytes:
    """A figure, without what else a program has written into it, and without what follows its end.

    Raises:
        UserError: If it is not a whole PNG file.
    """
    content = path.read_bytes()
    try:
        chunks = list(_png_chunks(content))
    except (ValueError, struct.error) as error:
        raise UserError(f"{path} is not a PNG file ({error}); remove it, or give it another ending.") from error
    return _PNG_SIGNATURE + b"".join(chunk for kind, chunk in chunks if kind in _PNG_PICTURE)


def read_sparsity(path: Path, d_sae: int) -> bytes:
    """SAELens's ``sparsity.safetensors``, made anew of its one tensor.

    Raises:
        UserError: If it is not such a file, with a number a latent.
    """
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 it is no dict
            if shapes != {"sparsity": [d_sae]}:
                raise UserError(f"{path} holds {shapes} instead of one number a latent, sparsity of [{d_sae}].")
            return save({"sparsity": file.get_tensor("sparsity").to(torch.float32)})
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or damaged ({error}).") from error


def weights_alone(path: Path, scratch: Path) -> Path:
    """The file of an SAE's parameters to publish: the very one, or one without the texts that its header holds.

    Args:
        path: The file, which has been checked and loaded.
        scratch: Where another one is made, if need be.
    """
    with safe_open(path, framework="pt") as file:
        texts = file.metadata() or {}
    if texts in ({}, {"format": "pt"}):
        return path
    scratch.mkdir(parents=True, exist_ok=True)
    save_file(load_file(path), scratch / path.name, {"format": "pt"})
    return scratch / path.name


_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_PICTURE = b"IHDR PLTE IDAT IEND tRNS cHRM gAMA iCCP sBIT sRGB bKGD hIST pHYs acTL fcTL fdAT".split()
"""What a PNG file shows; all else in it is text, time or a program's own."""


def _png_chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind and bytes of every chunk up to the end of the picture."""
    if not content.startswith(_PNG_SIGNATURE):
        raise ValueError("it does not begin like one")
    position = len(_PNG_SIGNATURE)
    kind = b""
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", content, position)
        end = position + 12 + length
        if end > len(content) or (position == len(_PNG_SIGNATURE)) != (kind == b"IHDR"):
            raise ValueError("it is truncated or damaged")
        yield kind, content[position:end]
        position = end
