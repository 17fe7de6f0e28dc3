"""An SAE is loaded whole or not at all: what can be wrong with its files is one sentence before anything is built.

The cheap part comes first: the config and the header of the weights file say what should be there. What only the
numbers show, such as NaN, is looked for once they are in memory.
"""

import math
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from safetensors import SafetensorError, safe_open
from torch import Tensor
from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

from sae_lens_matryoshka.errors import UserError
from sae_lens_matryoshka.saelens_fields import OBJECT, tables
from sae_lens_matryoshka.untrusted.bounded import check_bounded, load_json

CFG_FILENAME = "cfg.json"
WEIGHTS_FILENAME = "sae_weights.safetensors"
"""SAELens's own names (``sae_lens.constants``), which need not be imported for them."""

DTYPES = {
    prefix + name: getattr(torch, name)
    for prefix in ("", "torch.")
    for name in ("float32", "float64", "float16", "bfloat16")
}
"""The data types that SAELens saves, by their names in a config (``sae_lens.constants.DTYPE_MAP``)."""

TRAINING_ONLY = frozenset(
    ("topk_threshold", "topk_threshold_updates", "selection_guess", "share_that_matters", "latent_order_statistic")
)
"""Tensors that checkpoints of training SAEs hold and saved SAEs do not."""


def read_config(folder: Path) -> dict[str, Any]:
    """The contents of a saved SAE's ``cfg.json``, as they stand in the file.

    Raises:
        UserError: If there is none, it cannot be read, or it is not the config of an SAE that SAELens knows.
    """
    path = folder / CFG_FILENAME
    if not path.is_file():
        raise UserError(f"There is no saved SAE at {folder} (no {CFG_FILENAME}).")
    cfg = read_json(path)
    architecture = cfg.get("architecture", "standard")  # configs from before SAELens 3 have none
    known = tables()
    if not isinstance(architecture, str) or architecture not in {*known.saved, *known.training}:
        raise UserError(f"{path}: architecture={architecture!r} is none of {', '.join(known.saved)}.")
    if architecture not in known.saved:
        raise _training_checkpoint(folder)
    if not isinstance(cfg.get("dtype"), str) or cfg["dtype"] not in DTYPES:
        raise UserError(f"{path}: dtype={cfg.get('dtype')!r} is none of {', '.join(DTYPES)}.")
    _check_types({"metadata": {}, **cfg}, {"metadata": dict[str, Any], **_WIDTHS}, path)
    with loading_errors(str(path)):
        current = config_as_saelens_6(cfg)
    # SAELens itself checks normalize_activations, whose type hint lacks some of the values
    hints = {name: Any if field.type is OBJECT else field.type for name, field in known.saved[architecture].items()}
    hints |= {"metadata": Any, "normalize_activations": Any}
    _check_types({"d_in": None, "d_sae": None, **current}, hints, path)
    metadata = current.get("metadata", {})
    _check_types(metadata, _METADATA_TYPES, path, "metadata.")
    details = metadata.get("training_architecture_details") or {}
    _check_types(details, _WIDTHS, path, "metadata.training_architecture_details.")
    return cfg


_WIDTHS: dict[str, Any] = {"matryoshka_widths": list[int] | None}
_METADATA_TYPES: dict[str, Any] = {
    "hook_name": str | None,
    "model_name": str | None,
    "context_size": int | None,
    "prepend_bos": bool | None,
    "training_architecture_details": dict[str, Any] | None,
    **_WIDTHS,
}
"""The types of the metadata that are read here; others are shown as they are."""


def _check_types(values: dict[str, Any], hints: dict[str, Any], path: Path, prefix: str = "") -> None:
    """Refuse values that are not of their type, and numbers of things that are not positive."""
    for field in hints.keys() & values.keys():
        value, hint = values[field], hints[field]
        try:
            check_type(value, hint, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
            fits = hint is not int or (type(value) is int and value > 0)  # d_in, k, ...; True is an int to Python
        except TypeCheckError:
            fits = False
        if not fits:
            names = {int: "a positive whole number", bool: "true or false"}
            expected = names.get(hint, getattr(hint, "__name__", None) or str(hint).replace("typing.", ""))
            raise UserError(f"{path}: {prefix}{field}={value!r} must be {expected}.")


def _training_checkpoint(folder: Path) -> UserError:
    return UserError(
        f"{folder} is a training checkpoint, not a saved SAE; load it with TrainingSAE.load_from_disk and convert it "
        f"with MatryoshkaSAE.from_sae."
    )


def read_json(path: Path) -> dict[str, Any]:
    """The contents of a JSON file that holds an object.

    Raises:
        UserError: If it cannot be read or holds something else.
    """
    try:
        contents = load_json(path.read_text(encoding="utf-8"))
        check_bounded(contents)
    except (OSError, ValueError) as error:  # ValueError: bad JSON, bad UTF-8
        raise UserError(f"{path} cannot be read: {error}.") from error
    if not isinstance(contents, dict):
        raise UserError(f"{path} holds {type(contents).__name__} where the fields of a config should be.")
    return contents


def check_saved_sae(folder: Path, dtype: str | None = None) -> dict[str, Any]:
    """Check a folder that SAELens or this plugin has saved, without reading the weights, and return its config.

    Args:
        folder: The folder with ``cfg.json`` and ``sae_weights.safetensors``.
        dtype: The data type that the caller will load as; None means the config's, which must then hold the weights
            without rounding them.

    Raises:
        UserError: If a file is missing or truncated, or the stored tensors are not those of a saved SAE, are not
            floating-point numbers, contradict the config's shapes, or would be rounded to the data type that it says.
    """
    cfg = read_config(folder)
    path = folder / WEIGHTS_FILENAME
    if not path.is_file():
        raise UserError(f"The saved SAE at {folder} has no {WEIGHTS_FILENAME}.")
    d_in, d_sae = cfg["d_in"], cfg["d_sae"]
    d_out = cfg.get("d_out", d_in)  # of transcoders
    shapes = {"W_enc": [d_in, d_sae], "W_dec": [d_sae, d_out], "b_enc": [d_sae], "b_dec": [d_out], "threshold": [d_sae]}
    expected = DTYPES[dtype or cfg["dtype"]]
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            if not TRAINING_ONLY.isdisjoint(names):
                raise _training_checkpoint(folder)
            n_values = 0
            for name in names:
                header = file.get_slice(name)
                n_values += math.prod(header.get_shape())
                stored = _SAFETENSORS_DTYPES.get(header.get_dtype())
                if stored is None:
                    raise UserError(f"{path}: {name} is stored as {header.get_dtype()}, not as floating-point numbers.")
                # SAELens keeps learned thresholds in float32 whatever the SAE's data type, and casts what it loads
                if dtype is None and name != "threshold" and torch.promote_types(stored, expected) != expected:
                    raise UserError(
                        f"{path}: {name} is stored as {stored}, but {CFG_FILENAME} says {expected}; "
                        f"say which is meant by passing dtype."
                    )
                if name in shapes and header.get_shape() != shapes[name]:
                    raise UserError(
                        f"{path}: {name} has shape {header.get_shape()}, but d_in={d_in} and d_sae={d_sae} of "
                        f"{CFG_FILENAME} ask for {shapes[name]}."
                    )
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or damaged ({one_line(error)}).") from error
    if n_values < d_sae * max(d_in, d_out):  # SAELens would make room for them before it looks
        raise UserError(f"{path} holds {n_values:,} values, fewer than d_in={d_in} and d_sae={d_sae} ask for.")
    return cfg


@torch.no_grad()
def check_finite(named: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse tensors that are not usable numbers.

    An infinite threshold is allowed: it belongs to a latent that never fires.

    Raises:
        UserError: If one of them holds NaN or infinite values.
    """
    for name, tensor in named:
        if tensor.is_meta or tensor.isfinite().all():
            continue
        allowed = tensor.isfinite() | ((tensor == torch.inf) if name == "threshold" else False)
        bad = int((~allowed).sum())
        if bad:
            raise UserError(f"{name} of this SAE holds {bad} values that are NaN or infinite, of {tensor.numel()}.")


@contextmanager
def loading_errors(what: str) -> Iterator[None]:
    """Turn what SAELens and torch raise for files that do not fit together into one sentence on ``what`` is loaded."""
    try:
        yield
    except UserError:
        raise
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{what} cannot be loaded: {one_line(error)}.") from error
    except AssertionError as error:  # of SAELens's temporal SAEs, some of which say nothing but their condition
        condition = traceback.extract_tb(error.__traceback__)[-1].line or "an assertion"
        raise UserError(f"{what} cannot be loaded: {one_line(error) or f'it fails {condition!r}'}.") from error
    except RuntimeError as error:
        if "loading state_dict" not in str(error):
            raise
        raise UserError(f"The weights of {what} do not fit its config: {one_line(error)}") from error


def config_as_saelens_6(cfg: dict[str, Any]) -> dict[str, Any]:
    """An SAE's config with metadata where SAELens 6 puts them; older ones hold everything side by side."""
    version = cfg.get("sae_lens_version") or (cfg.get("metadata") or {}).get("sae_lens_version")
    if version and Version(version) >= Version("6"):
        return cfg
    from sae_lens.loading.pretrained_sae_loaders import handle_config_defaulting

    return handle_config_defaulting(dict(cfg))


_SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def one_line(error: BaseException) -> str:
    """What an error says, to be put into a sentence."""
    return " ".join(str(error).split()).rstrip(".")
