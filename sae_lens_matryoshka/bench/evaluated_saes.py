"""What is evaluated: SAEs and levels of SAEs under a name, and the face of them that SAEBench sees.

SAEBench wants unit-norm decoders and a config with a TransformerLens hook and a layer. :class:`SAEView` gives it both
without changing the SAE. :class:`SharedEncoder` encodes for all levels of an SAE at once.
"""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE, TopKSAE
from torch import Tensor

from sae_lens_matryoshka.errors import UserError
from sae_lens_matryoshka.in_model.hook_names import block_output
from sae_lens_matryoshka.levels import level_index
from sae_lens_matryoshka.saes.matryoshka_sae import MatryoshkaSAE
from sae_lens_matryoshka.saved.fingerprints import sae_hash, typed_hash


@dataclass(frozen=True)
class EvaluatedSAE:
    """An SAE, or one level of one, under the name that results carry."""

    name: str
    """Stands for the release in SAEBench's results and file names."""

    sae: SAE[Any]
    level: int | None = None
    """Index of the level; None for an SAE without levels."""

    @property
    def sae_id(self) -> str:
        """SAEBench's id, for a whole SAE that of an SAE passed as an object."""
        return "custom_sae" if self.level is None else f"level_{self.level}"

    @property
    def width(self) -> int:
        return self.cut_out.cfg.d_sae

    @cached_property
    def cut_out(self) -> SAE[Any]:
        """The SAE itself, or its level as an SAE of its own, on the same parameters."""
        if self.level is None:
            return self.sae
        assert isinstance(self.sae, MatryoshkaSAE)
        return self.sae.at_level(self.level)

    @property
    def hash(self) -> str:
        """A name for its parameters and settings, with the data type that it is evaluated in."""
        return typed_hash(self.cut_out)

    def __str__(self) -> str:
        return self.name if self.level is None else f"{self.name} level {self.level}"


def levels(name: str, sae: SAE[Any], which: Sequence[int] | None = None) -> list[EvaluatedSAE]:
    """Every level of a Matryoshka SAE, or some of them; any other SAE as itself.

    Args:
        name: The name that results carry.
        sae: The SAE.
        which: Indices of levels, negative ones counting from the end; None takes all.

    Raises:
        UserError: If there is no such level.
    """
    if not isinstance(sae, MatryoshkaSAE):
        return [EvaluatedSAE(name, sae)]
    try:
        indices = range(sae.n_levels) if which is None else [level_index(level, sae.widths) for level in which]
    except IndexError as error:
        raise UserError(f"{name}: {error}") from error
    return [EvaluatedSAE(name, sae, index) for index in sorted(set(indices))]


@dataclass(frozen=True)
class Hook:
    """Where in the model the activations are taken."""

    name: str
    """TransformerLens's name, for instance ``blocks.2.hook_resid_post``."""

    layer: int


def hook_of(sae: SAE[Any], override: str | None = None) -> Hook:
    """The hook of an SAE in TransformerLens's names.

    SAEs trained on Hugging Face models name a module instead, such as ``model.layers.2``: the output of that block,
    which TransformerLens calls ``blocks.2.hook_resid_post``.

    Args:
        sae: The SAE; its metadata name the hook.
        override: A TransformerLens hook to use instead.

    Raises:
        UserError: If the SAE does not say, or names something else.
    """
    name = override or sae.cfg.metadata.hook_name
    if name is None:
        raise UserError(
            "The SAE does not record its hook; name it with hook_name, for instance blocks.2.hook_resid_post."
        )
    name = block_output(name) or name
    layer = re.match(r"blocks\.([0-9]{1,6})\.", name)
    if layer is None:
        raise UserError(f"hook_name={name!r} is not a hook of a block; name one as blocks.2.hook_resid_post.")
    return Hook(name, int(layer[1]))


class SAEView:
    """An SAE as SAEBench wants it: decoder directions of length 1, a hook, a layer, a model's name.

    Nothing of the SAE changes: its activations are multiplied by the norms of its decoder directions, which are divided
    by them. That leaves every reconstruction as it is, for any architecture. Norms that SAEBench takes for 1 (to 1e-5)
    are left alone, so that its own numbers come out to the last bit.
    """

    def __init__(self, sae: SAE[Any], hook: Hook, model_name: str) -> None:
        self.sae = sae
        self.dtype = sae.dtype
        self.device = sae.device
        norms = sae.W_dec.detach().norm(dim=-1)
        norms = torch.where(norms == 0, torch.ones_like(norms), norms)
        tolerance = 1e-2 if sae.dtype in (torch.bfloat16, torch.float16) else 1e-5
        self._norms = None if torch.allclose(norms, torch.ones_like(norms), atol=tolerance) else norms
        # SAEs that rescale activations by these norms have multiplied by them already
        rescaled = getattr(sae.cfg, "rescale_acts_by_decoder_norm", False)
        self._scale = None if rescaled else self._norms
        self.cfg = copy.deepcopy(sae.cfg)
        metadata = self.cfg.metadata
        metadata.hook_name, metadata.hook_layer, metadata.model_name = hook.name, hook.layer, model_name
        if metadata.prepend_bos is None:
            metadata.prepend_bos = True

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        return self.scaled(self.sae.encode(x))

    def decode(self, feature_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_in"]:
        return self.sae.decode(feature_acts if self._scale is None else feature_acts / self._scale)

    def scaled(self, feature_acts: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """Activations of the SAE's first latents as they are with unit-norm directions."""
        return feature_acts if self._scale is None else feature_acts * self._scale[: feature_acts.shape[-1]]

    @cached_property
    def W_dec(self) -> Float[Tensor, "d_sae d_in"]:
        W_dec = self.sae.W_dec.detach()
        return W_dec if self._norms is None else W_dec / self._norms[:, None]

    @cached_property
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:
        W_enc = self.sae.W_enc.detach()
        return W_enc if self._norms is None else W_enc * self._norms

    @cached_property
    def b_enc(self) -> Float[Tensor, " d_sae"]:
        b_enc = getattr(self.sae, "b_enc", None)
        if b_enc is None:
            return torch.zeros_like(self.W_dec[:, 0])
        return b_enc.detach() if self._norms is None else b_enc.detach() * self._norms

    @cached_property
    def hash(self) -> str:
        """A name for the SAE's parameters and settings."""
        return sae_hash(self.sae)

    @property
    def decodes_linearly(self) -> bool:
        """Whether the reconstruction is ``feature_acts @ W_dec + b_dec``, the same for every token."""
        return self.cfg.normalize_activations == "none" and self.cfg.reshape_activations == "none"

    def to(self, *_: Any, **__: Any) -> "SAEView":
        """SAEBench moves SAEs to its device and type; a view stays where its SAE is."""
        return self


class SharedEncoder:
    """All levels of an SAE as one SAE to SAEBench: whatever latents some level has, each encoded once.

    Where a level's encoding is the first latents of the full one, that is the full one. A TopK level takes the top k
    among its own latents, so the levels' encodings stand side by side.
    """

    def __init__(self, view: SAEView) -> None:
        self.view = view
        sae = view.sae
        widths = sae.widths if isinstance(sae, MatryoshkaSAE) else [sae.cfg.d_sae]
        self._levels_are_slices = len(widths) == 1 or not isinstance(sae, TopKSAE)
        starts = [0] * len(widths) if self._levels_are_slices else [sum(widths[:level]) for level in range(len(widths))]
        self._columns = [slice(start, start + width) for start, width in zip(starts, widths, strict=True)]

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch n_columns"]:
        if self._levels_are_slices:
            return self.view.encode(x)
        assert isinstance(self.view.sae, MatryoshkaSAE)
        return torch.cat([self.view.scaled(acts) for acts in self.view.sae.encode_levels(x)], dim=-1)

    def of_level(self, encoded: Float[Tensor, "*batch n_columns"], level: int | None) -> Float[Tensor, "*batch width"]:
        """The latents of one level among what :meth:`encode` returns."""
        return encoded[..., self._columns[-1 if level is None else level]]


def grouped(saes: Sequence[EvaluatedSAE]) -> list[list[EvaluatedSAE]]:
    """The SAEs in groups that share an encoder: the levels of one SAE together.

    Raises:
        UserError: If two have the same name and id.
    """
    groups: dict[int, list[EvaluatedSAE]] = {}
    seen: set[tuple[str, str]] = set()
    for sae in saes:
        if (sae.name, sae.sae_id) in seen:
            raise UserError(f"{sae} is there twice; give every SAE a name of its own.")
        seen.add((sae.name, sae.sae_id))
        groups.setdefault(id(sae.sae), []).append(sae)
    return list(groups.values())


def on_device(saes: Sequence[EvaluatedSAE], device: torch.device, dtype: torch.dtype) -> list[EvaluatedSAE]:
    """The SAEs on a device in a data type: copies where they are elsewhere, themselves where not."""
    moved: dict[int, SAE[Any]] = {}
    for evaluated in saes:
        sae = evaluated.sae
        if id(sae) not in moved:
            here = torch.device(sae.device) == device and sae.dtype == dtype
            moved[id(sae)] = sae if here else copy.deepcopy(sae).to(device=device, dtype=dtype)
    return [replace(evaluated, sae=moved[id(evaluated.sae)]) for evaluated in saes]
