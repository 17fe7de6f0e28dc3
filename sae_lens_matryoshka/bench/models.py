"""The language model: given as an object, by TransformerLens's name, or as the folder of a Hugging Face model."""

import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformer_lens import HookedTransformer
from transformer_lens.model_bridge import TransformerBridge

from sae_lens_matryoshka.devices import warn_of_slow_bfloat16
from sae_lens_matryoshka.errors import UserError, first_line
from sae_lens_matryoshka.model_folders import check_model_folder

Model = HookedTransformer | TransformerBridge


def load_model(model: "Model | str | Path", device: str = "cpu", dtype: str = "float32") -> Model:
    """The model, with TransformerLens's hooks and its weights as they are.

    A name that ``HookedTransformer`` knows is loaded as SAEBench loads it; anything else, such as a local folder,
    through ``TransformerBridge``.

    Args:
        model: The model, its name or its folder. A model that is given is neither moved nor converted.
        device: Where to load it to.
        dtype: The data type to load it as.

    Raises:
        UserError: If there is no such model, it cannot be fetched, or tensors of it are missing or damaged.
    """
    if not isinstance(model, str | Path):
        return model
    name = os.path.expanduser(str(model))
    check_model_folder(name)
    torch_dtype = getattr(torch, dtype)
    warn_of_slow_bfloat16(device, torch_dtype, "--dtype float32")
    try:
        if not Path(name).is_dir():
            try:
                return HookedTransformer.from_pretrained_no_processing(name, device=device, dtype=torch_dtype)
            except ValueError:  # a name that HookedTransformer does not know
                pass
        bridge = TransformerBridge.boot_transformers(name, device=device, dtype=torch_dtype)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"The model {name!r} cannot be loaded ({first_line(error)}); "
            "pass a folder with a Hugging Face model, a name that TransformerLens knows, or the model itself."
        ) from error
    bridge.enable_compatibility_mode(no_processing=True)
    return bridge


def model_name_of(model: Model) -> str:
    """The name that results carry: the last part of a path, so that results do not tell where a model lay."""
    name = str(model.cfg.model_name)
    return Path(name).name if Path(name).is_dir() else name
