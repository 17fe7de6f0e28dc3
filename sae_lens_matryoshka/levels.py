"""Levels of a Matryoshka dictionary: building their widths, checking them, mapping latents and indices to them.

Level l of a dictionary with widths w_0 < w_1 < ... < w_{L-1} = d_sae is its first w_l latents, so every level
contains all smaller ones (Bussmann et al., arXiv:2503.17547, section 3).
"""

import itertools
import math
import warnings
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from sae_lens_matryoshka.errors import UserError

SAVED_AS = {"jumprelu": "matryoshka", "topk": "matryoshka_topk", "standard": "matryoshka_standard"}
"""The SAELens architectures that trained Matryoshka SAEs are saved as, and ours that they are with their levels."""


def paper_widths(d_sae: int) -> list[int]:
    """The paper's five prefixes, 1/32, 3/32, 7/32, 15/32 and all of ``d_sae`` latents, rounded to whole latents.

    Source: arXiv:2503.17547, section 4 (Gemma-2-2B, with 65536 latents).

    Raises:
        ValueError: If ``d_sae`` is too small for five different widths.
    """
    widths = [round(d_sae * n / 32) for n in (1, 3, 7, 15, 32)]
    return _strictly_increasing(widths, f"d_sae={d_sae} is too small for the paper's five prefixes; use d_sae >= 32")


def geometric_widths(d_sae: int, n_levels: int, ratio: float = 2.0) -> list[int]:
    """``n_levels`` widths, each ``ratio`` times the one before, the last of them ``d_sae``.

    Raises:
        ValueError: If ``n_levels`` is below 1, ``ratio`` is not above 1, or two widths would round to the same number.
    """
    if n_levels < 1:
        raise ValueError(f"n_levels={n_levels} must be at least 1.")
    if not ratio > 1:
        raise ValueError(f"ratio={ratio} must be above 1, so that every level is wider than the one before.")
    widths = [round(d_sae / ratio**exponent) for exponent in reversed(range(n_levels))]
    return _strictly_increasing(
        widths, f"d_sae={d_sae} is too small for n_levels={n_levels} levels of ratio={ratio}; use fewer levels"
    )


def validate_widths(widths: Sequence[int], d_sae: int, field: str = "matryoshka_widths") -> list[int]:
    """Check the widths of a dictionary of ``d_sae`` latents and return them as a new list of plain ints.

    Like SAELens, a last width below ``d_sae`` warns and adds the full level. The caller's sequence is left alone.

    Args:
        widths: The number of latents of each level, smallest level first.
        d_sae: The number of latents of the whole dictionary.
        field: The name that errors give to the widths.

    Raises:
        ValueError: If the widths are empty, or one of them is not a whole number, not positive, not above the one
            before it, or above ``d_sae``. The message names the field, the value and a remedy.
    """
    if isinstance(widths, str) or not isinstance(widths, Sequence):
        raise ValueError(f"{field}={widths!r} must be a list of level widths, for example {_example_widths(d_sae)}.")
    if len(widths) == 0:
        raise ValueError(f"{field}=[] is empty: give the width of every level, for example {_example_widths(d_sae)}.")
    for width in widths:
        if isinstance(width, bool) or not isinstance(width, Integral):
            raise ValueError(f"{field}={list(widths)}: {width!r} is not a whole number of latents; write it as an int.")
        if width <= 0:
            raise ValueError(f"{field}={list(widths)}: {width} is not positive; every level needs at least one latent.")
        if width > d_sae:
            raise ValueError(f"{field}={list(widths)}: {width} is above d_sae={d_sae}; lower it or raise d_sae.")
    for narrower, wider in itertools.pairwise(widths):
        if narrower >= wider:
            problem = f"{wider} is repeated" if narrower == wider else f"{wider} comes after {narrower}"
            raise ValueError(
                f"{field}={list(widths)} must be strictly increasing, but {problem}; use {sorted(set(widths))}."
            )
    checked = [int(width) for width in widths]
    if checked[-1] < d_sae:
        warnings.warn(
            f"{field}={checked} ends below d_sae={d_sae}: the full level of width {d_sae} is added. "
            f"Append {d_sae} to say so yourself.",
            stacklevel=2,
        )
        checked.append(d_sae)
    return checked


def recorded_widths(cfg_dict: dict[str, Any]) -> list[int] | None:
    """The level widths that an SAE's config, as ``cfg.to_dict()`` gives it, records, or None.

    They stand in our own configs, in the metadata of levels cut out of an SAE, and in SAELens's metadata of how the
    SAE was trained (``training_architecture_details``).
    """
    metadata = cfg_dict.get("metadata") or {}
    training_details = metadata.get("training_architecture_details") or {}
    recorded = (source.get("matryoshka_widths") for source in (cfg_dict, metadata, training_details))
    return next((list(widths) for widths in recorded if widths), None)


def level_widths(cfg_dict: dict[str, Any], widths: Sequence[int] | None = None) -> list[int]:
    """The level widths of an SAE: those that its config records, or those given by hand where it records none.

    Args:
        cfg_dict: Its config as ``cfg.to_dict()`` gives it.
        widths: Widths given by hand; either may leave out the full one.

    Raises:
        UserError: If those given are not those recorded.
        ValueError: If there are none, or they do not fit the SAE.
    """
    recorded, d_sae = recorded_widths(cfg_dict), cfg_dict["d_sae"]
    if widths is None:
        if recorded is None:
            raise ValueError(
                f"This {cfg_dict.get('architecture')} SAE does not record its level widths. If it was trained as a "
                f"Matryoshka SAE, pass them: widths=[..., {d_sae}]."
            )
        return validate_widths(recorded, d_sae)
    given = validate_widths(widths, d_sae, "widths")
    if recorded is not None and given != list(dict.fromkeys([*recorded, d_sae])):
        raise UserError(f"widths={list(widths)} contradict this SAE's own, {list(recorded)}; leave them out.")
    return given


def validate_level_weights(weights: Sequence[float], n_levels: int, field: str = "level_weights") -> list[float]:
    """Check the loss weights of ``n_levels`` levels and return them as a new list of plain floats.

    Raises:
        ValueError: If there is not one weight a level, or one is not a finite number or is negative, or all are zero.
    """
    if isinstance(weights, str) or not isinstance(weights, Sequence) or len(weights) != n_levels:
        raise ValueError(
            f"{field}={weights!r} must hold one weight for each of the {n_levels} levels, "
            f"for example {[1.0] * n_levels}."
        )
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, Real) or not math.isfinite(weight):
            raise ValueError(f"{field}={list(weights)}: {weight!r} is not a finite number; use 0 to ignore a level.")
        if weight < 0:
            raise ValueError(f"{field}={list(weights)}: {weight} is negative; use 0 to ignore a level.")
    if not any(weights):
        raise ValueError(f"{field}={list(weights)} are all zero, so nothing would be trained; give one level a weight.")
    return [float(weight) for weight in weights]


def level_index(level: int, widths: Sequence[int]) -> int:
    """``level`` as an index from 0, negative ones counting from the end as in a list.

    Raises:
        IndexError: If there is no such level. The message lists the levels.
    """
    if not -len(widths) <= level < len(widths):
        levels = ", ".join(f"{index} (width {width})" for index, width in enumerate(widths))
        raise IndexError(f"level {level} is out of range: the levels are {levels}.")
    return level % len(widths)


def level_of(latent_ids: Int[Tensor, "*batch"] | Sequence[int] | int, widths: Sequence[int]) -> Int[Tensor, "*batch"]:
    """The index of the smallest level that contains each latent.

    Args:
        latent_ids: Latent indices, of any shape.
        widths: The level widths, smallest first.

    Returns:
        A tensor of level indices of the same shape as ``latent_ids``.

    Raises:
        IndexError: If an id is negative or not below the last width.
    """
    ids = torch.as_tensor(latent_ids)
    if ids.numel() > 0 and (ids.min() < 0 or ids.max() >= widths[-1]):
        raise IndexError(f"latent ids must lie in 0..{widths[-1] - 1}, got {ids.min().item()}..{ids.max().item()}.")
    return torch.bucketize(ids, torch.tensor(widths, device=ids.device), right=True)


def _strictly_increasing(widths: list[int], problem: str) -> list[int]:
    if widths[0] < 1 or any(a >= b for a, b in itertools.pairwise(widths)):
        raise ValueError(f"{problem} (rounded widths: {widths}).")
    return widths


def _example_widths(d_sae: int) -> list[int]:
    return paper_widths(d_sae) if d_sae >= 32 else [d_sae]
