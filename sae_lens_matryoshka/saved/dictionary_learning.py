"""Reading the Matryoshka SAEs of saprmarks/dictionary_learning, among them SAEBench's.

Its ``MatryoshkaBatchTopKSAE`` saves a state dict, ``ae.pt``, and its training script a ``config.json`` beside it. Read
from version 0.1.0: ``encode`` computes ``relu((x - b_dec) @ W_enc + b_enc)`` and keeps what is above one ``threshold``;
``group_sizes`` are the sizes of the groups that its levels add one by one, so the widths are their running sums.
"""

import pickle
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch
from sae_lens import __version__
from sae_lens.constants import DTYPE_MAP
from torch import Tensor

from sae_lens_matryoshka.errors import UserError
from sae_lens_matryoshka.saved.checkpoint_files import check_checkpoint_file
from sae_lens_matryoshka.saved.checks import read_json

WEIGHTS_FILENAME = "ae.pt"
CONFIG_FILENAME = "config.json"


class NotMatryoshkaError(UserError):
    """A checkpoint that has no groups of latents."""


def dictionary_learning_disk_loader(
    path: str | Path, device: str = "cpu", cfg_overrides: dict[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a ``MatryoshkaBatchTopKSAE`` checkpoint; a SAELens disk loader, for ``load_from_disk(converter=...)``.

    Args:
        path: The folder with ``ae.pt`` and, if there is one, ``config.json``; or another such file by its own name.
        device: The device to load to.
        cfg_overrides: Fields of the config to set, such as ``dtype``.

    Returns:
        A ``jumprelu`` config whose metadata hold the widths, and the parameters by SAELens's names.

    Raises:
        NotMatryoshkaError: If it is a checkpoint without groups of latents.
        UserError: If the file is missing, damaged, holds anything but tensors, or is no such checkpoint.
    """
    path = Path(path)
    file = path / WEIGHTS_FILENAME if path.is_dir() else path
    checkpoint = _read_tensors(file)
    d_in, d_sae = _check(checkpoint, file)
    overrides = cfg_overrides or {}
    dtype = DTYPE_MAP[overrides.get("dtype") or "float32"]
    state_dict = {
        name: checkpoint[name].to(device=device, dtype=dtype).contiguous()
        for name in ("W_enc", "b_enc", "W_dec", "b_dec")
    }
    state_dict["threshold"] = checkpoint["threshold"].to(device=device, dtype=dtype).expand(d_sae).clone()
    metadata = {
        "sae_lens_version": __version__,
        "sae_lens_training_version": None,
        "training_architecture": "dictionary_learning MatryoshkaBatchTopKSAE",
        "matryoshka_widths": checkpoint["group_sizes"].cumsum(0).tolist(),
        **_training_metadata(file.parent / CONFIG_FILENAME),
    }
    if "k" in checkpoint:
        metadata["training_architecture_details"] = {"k": int(checkpoint["k"])}
    cfg = {
        "architecture": "jumprelu",
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "device": device,
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": metadata,
    }
    for key, value in overrides.items():  # SAELens hands over fields of the config and of the metadata together
        (cfg if key in cfg else metadata)[key] = value
    return cfg, state_dict


def _read_tensors(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise UserError(f"There is no dictionary_learning checkpoint at {file}.")
    try:
        check_checkpoint_file(file)
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{file} holds more than tensors, or is no checkpoint, and is not unpickled.") from error
    except (RuntimeError, EOFError, OSError, BadZipFile) as error:
        raise UserError(f"{file} is truncated or damaged ({' '.join(str(error).split())[:200]}).") from error
    if not isinstance(checkpoint, dict) or not all(isinstance(value, Tensor) for value in checkpoint.values()):
        raise UserError(f"{file} does not hold the parameters of an SAE by name.")
    for name, tensor in checkpoint.items():
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise UserError(f"{file}: {name} declares {tensor.numel():,} values, more than the file holds.")
    return checkpoint


def _check(checkpoint: dict[str, Tensor], file: Path) -> tuple[int, int]:
    """Check names, types and shapes, and return d_in and d_sae."""
    needed = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "group_sizes")
    missing = [name for name in needed if name not in checkpoint]
    if missing:
        raise (NotMatryoshkaError if "group_sizes" in missing else UserError)(
            f"{file} is not a checkpoint of dictionary_learning's MatryoshkaBatchTopKSAE: {', '.join(missing)} missing."
        )
    if checkpoint["W_enc"].ndim != 2:
        raise UserError(f"{file}: W_enc has shape {list(checkpoint['W_enc'].shape)} instead of [d_in, d_sae].")
    d_in, d_sae = checkpoint["W_enc"].shape
    shapes = {"b_enc": [d_sae], "W_dec": [d_sae, d_in], "b_dec": [d_in], "threshold": []}
    for name, shape in shapes.items():
        if list(checkpoint[name].shape) != shape:
            raise UserError(f"{file}: {name} has shape {list(checkpoint[name].shape)} instead of {shape}.")
    for name in ("W_enc", *shapes):
        if not checkpoint[name].is_floating_point():
            raise UserError(f"{file}: {name} is stored as {checkpoint[name].dtype}, not as floating-point numbers.")
    sizes = checkpoint["group_sizes"]
    if sizes.ndim != 1 or sizes.is_floating_point() or (sizes <= 0).any() or int(sizes.sum()) != d_sae:
        raise UserError(f"{file}: group_sizes={sizes.tolist()} must be positive whole numbers that sum to {d_sae}.")
    return d_in, d_sae


def _training_metadata(path: Path) -> dict[str, Any]:
    """What ``config.json`` says about model, hook and context, by SAELens's names."""
    if not path.is_file():
        return {}
    config = read_json(path)
    trainer, buffer = (config.get(part) or {} for part in ("trainer", "buffer"))
    if not isinstance(trainer, dict) or not isinstance(buffer, dict):
        raise UserError(f"{path}: trainer and buffer must be mappings of settings.")
    metadata: dict[str, Any] = {}
    if isinstance(trainer.get("lm_name"), str):
        metadata["model_name"] = trainer["lm_name"]
    if isinstance(trainer.get("layer"), int) and "resid_post" in str(trainer.get("submodule_name") or "resid_post"):
        metadata["hook_name"] = f"blocks.{trainer['layer']}.hook_resid_post"
    if isinstance(buffer.get("ctx_len"), int):
        metadata["context_size"] = buffer["ctx_len"]
    return metadata
