"""Using a trained Matryoshka SAE: an SAE whose levels can be encoded, decoded, compared and cut out.

Level l of an SAE with widths w_0 < w_1 < ... is made of its first w_l latents. No level needs retraining: every one is
a slice of the same parameters. ``matryoshka_sae_kinds.py`` holds one class for each way of making latents sparse.
"""

import copy
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens import SAE, PretrainedSaeDiskLoader, PretrainedSaeHuggingfaceLoader, SAEConfig, TrainingSAE
from sae_lens.loading.pretrained_sae_loaders import sae_lens_disk_loader
from sae_lens.saes.sae import SAEMetadata
from sae_lens.util import dtype_to_str
from torch import Tensor, nn
from typing_extensions import override

from sae_lens_matryoshka.levels import SAVED_AS, level_index, level_of, level_widths, validate_widths
from sae_lens_matryoshka.ops.pruning import leave_one_out_gains
from sae_lens_matryoshka.saes.kinds import KINDS
from sae_lens_matryoshka.saes.plugin_sae import PluginSAE
from sae_lens_matryoshka.saved.checks import check_finite
from sae_lens_matryoshka.saved.loaded import load_published_sae, load_saved_sae


@dataclass
class MatryoshkaSAEConfig(SAEConfig):
    """What the configurations of Matryoshka SAEs have beside the fields of the SAELens architecture they are.

    Args:
        matryoshka_widths (list[int]): The number of latents of each level, smallest level first, the last one d_sae.
    """

    matryoshka_widths: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.matryoshka_widths = validate_widths(self.matryoshka_widths, self.d_sae)
        super().__post_init__()

    @override
    @classmethod
    def architecture(cls) -> str:
        return SAVED_AS[super().architecture()]  # type: ignore[safe-super]


class MatryoshkaSAE(PluginSAE):
    """An SAE with levels. Wherever SAELens takes an SAE it takes this one, as the full level.

    Made by :meth:`load_from_disk`, :meth:`from_pretrained` and :meth:`from_sae`, which return the architecture's class.
    Levels are named by index: 0 is the smallest, -1 the full one. No such index: an ``IndexError`` that lists them.
    """

    cfg: MatryoshkaSAEConfig  # type: ignore[assignment]
    b_enc: nn.Parameter
    level_class: type[SAE[Any]]
    """The class of a level that has been cut out."""

    level_config_class: type[SAEConfig]
    """Its config class, which is SAELens's own."""

    @property
    def widths(self) -> list[int]:
        """The number of latents of each level, smallest level first."""
        return list(self.cfg.matryoshka_widths)

    @property
    def n_levels(self) -> int:
        return len(self.cfg.matryoshka_widths)

    def level_of(self, latent_ids: Int[Tensor, "*batch"] | Sequence[int] | int) -> Int[Tensor, "*batch"]:
        """The index of the smallest level that contains each latent; see :func:`levels.level_of`."""
        return level_of(latent_ids, self.widths)

    @abstractmethod
    def _activate(self, hidden_pre: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """Activations of the first ``width`` latents, standing alone, from their pre-activations."""

    def _coefficients(self, feature_acts: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """What the first ``width`` decoder rows are multiplied by."""
        return feature_acts

    @override
    def encode(
        self, x: Float[Tensor, "*batch d_in"], level: int | None = None, prune_below: float | None = None
    ) -> Float[Tensor, "*batch width"]:
        """Latent activations of one level; None means all ``d_sae`` of them. Only that level's columns are computed.

        Args:
            x: Activations of the model, shape (..., d_in).
            level: Index of the level.
            prune_below: Leave out active latents whose direction the level's others explain: those whose gain
                (:mod:`ops.pruning`, in units of the normalized ``x``) is at most this, all judged by the reconstruction
                from all. :func:`measure_pruning` shows what a value costs.

        Raises:
            IndexError: If there is no such level.
        """
        width = self._width(level)
        sae_in = self.process_sae_in(x)
        hidden_pre = self.hook_sae_acts_pre(sae_in @ self.W_enc[:, :width] + self.b_enc[:width])
        feature_acts = self._activate(hidden_pre)
        if prune_below is not None:
            *places, gains = self.leave_one_out_gains(sae_in, feature_acts)
            pruned = tuple(of_entries[gains <= prune_below] for of_entries in places)
            feature_acts = feature_acts.view(-1, width).index_put(pruned, x.new_zeros(())).view_as(feature_acts)
        return self.hook_sae_acts_post(feature_acts)

    def leave_one_out_gains(
        self, sae_in: Float[Tensor, "*batch d_in"], feature_acts: Float[Tensor, "*batch width"]
    ) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"], Float[Tensor, " n"]]:
        """Sample (batch dimensions flattened), latent and gain of a level's active latents on a processed input."""
        target = sae_in if self.cfg.apply_b_dec_to_input else sae_in - self.b_dec
        parts = (target.flatten(0, -2), self._coefficients(feature_acts).flatten(0, -2))
        return leave_one_out_gains(*parts, self.W_dec[: feature_acts.shape[-1]])

    def encode_levels(self, x: Float[Tensor, "*batch d_in"]) -> list[Float[Tensor, "*batch width"]]:
        """The activations of every level, smallest level first: ``[encode(x, level) for level in ...]``, encoding once.

        Args:
            x: Activations of the model, shape (..., d_in).
        """
        feature_acts = self.encode(x)
        return [feature_acts[..., :width] for width in self.widths]

    @override
    def decode(
        self, feature_acts: Float[Tensor, "*batch width"], level: int | None = None
    ) -> Float[Tensor, "*batch d_in"]:
        """The reconstruction from the activations of one level; None means all ``d_sae`` latents.

        Args:
            feature_acts: Latent activations as ``encode(x, level)`` returns them, shape (..., width of the level).
            level: Index of the level.

        Raises:
            IndexError: If there is no such level.
            ValueError: If ``feature_acts`` has another width than the level.
        """
        width = self._width(level)
        if feature_acts.shape[-1] != width:
            raise ValueError(
                f"feature_acts holds {feature_acts.shape[-1]} latents, but level={level} has {width}; "
                f"pass the level they were encoded with, or feature_acts[..., :{width}]."
            )
        sae_out_pre = self.hook_sae_recons(self._coefficients(feature_acts) @ self.W_dec[:width] + self.b_dec)
        return self.reshape_fn_out(self.run_time_activation_norm_fn_out(sae_out_pre), self.d_head)

    def decode_levels(self, feature_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "n_levels *batch d_in"]:
        """The reconstruction from the first ``w_l`` of all latents' activations, for every level l, as in training.

        Each level adds its own latents to the sum of the smaller ones, so all cost what the full one costs. Hooks do
        not fire: they expect a single reconstruction.

        Args:
            feature_acts: Activations of all latents, as ``encode(x)`` returns them.

        Returns:
            A tensor of shape (n_levels, ..., d_in), smallest level first.
        """
        coefficients = self._coefficients(feature_acts)
        reconstruction, narrower = self.b_dec, 0
        reconstructions: list[Tensor] = []
        for width in self.widths:
            reconstruction = reconstruction + coefficients[..., narrower:width] @ self.W_dec[narrower:width]
            reconstructions.append(reconstruction)
            narrower = width
        return self._finish_levels(torch.stack(reconstructions))

    def reconstruct_levels(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "n_levels *batch d_in"]:
        """Every level's own reconstruction of ``x``, smallest level first.

        Args:
            x: Activations of the model, shape (..., d_in).

        Returns:
            A tensor of shape (n_levels, ..., d_in).
        """
        return self.decode_each_level(self.encode_levels(x))

    def decode_each_level(
        self, level_acts: Sequence[Float[Tensor, "*batch width"]]
    ) -> Float[Tensor, "n_levels *batch d_in"]:
        """Every level's reconstruction from its own activations, as :meth:`encode_levels` returns them."""
        return self.decode_levels(level_acts[-1])

    def at_level(self, level: int) -> SAE[Any]:
        """One level as a standalone SAE, which SAELens saves, evaluates and attaches to models like any other.

        It is of the SAELens architecture that this SAE is saved as, and shares storage with it: changing the
        parameters of one in place changes the other. Its metadata say what it was cut from, under
        ``matryoshka_cut_from``, and keep the widths of the levels that it contains.

        Args:
            level: Index of the level.

        Raises:
            IndexError: If there is no such level.
        """
        index = level_index(level, self.widths)
        width = self.widths[index]
        metadata = copy.deepcopy(self.cfg.metadata)
        # figures of the full dictionary do not hold for a level
        for full_only in ("l0", "num_dead_features"):
            if full_only in metadata:
                delattr(metadata, full_only)
        metadata.matryoshka_widths = self.widths[: index + 1]
        metadata.matryoshka_cut_from = {"level": index, "d_sae": self.cfg.d_sae, "matryoshka_widths": self.widths}
        kept = {f.name: getattr(self.cfg, f.name) for f in fields(self.level_config_class)}
        if "k" in kept:
            kept["k"] = min(kept["k"], width)
        # on the meta device, since the parameters made there are replaced by this SAE's
        sae = self.level_class(
            self.level_config_class(**{**kept, "d_sae": width, "device": "meta", "metadata": metadata})
        )
        for name, parameter in self.named_parameters():
            part = parameter if name == "b_dec" else parameter[:, :width] if name == "W_enc" else parameter[:width]
            setattr(sae, name, nn.Parameter(part.detach(), requires_grad=parameter.requires_grad))
        sae.cfg.device = self.cfg.device
        sae.device = self.device
        return sae

    @classmethod
    def saved_architecture(cls) -> str:
        """The SAELens architecture that every level is, the full one among them."""
        return cls.level_config_class.architecture()

    @classmethod
    def from_sae(cls, sae: SAE[Any], widths: Sequence[int] | None = None) -> "MatryoshkaSAE":
        """Give the levels back to an SAE.

        An SAE for inference keeps its parameters, which are shared, not copied. A training SAE is converted as it
        would be for saving.

        Args:
            sae: An SAE such as SAELens loads from a saved Matryoshka SAE (JumpReLU, TopK or standard), or one in
                training that would be saved as one of these.
            widths: The level widths, for SAEs published without them; None reads them from the config or metadata.

        Raises:
            ValueError: If the widths are neither given nor recorded, contradict the recorded ones, or do not fit the
                SAE.
            TypeError: If levels cannot be given to this kind of SAE.
        """
        if isinstance(sae, TrainingSAE):
            cfg_dict = copy.deepcopy(sae.cfg.get_inference_sae_cfg_dict())
            state_dict = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
            sae.process_state_dict_for_saving_inference(state_dict)
        else:
            cfg_dict = copy.deepcopy(sae.cfg.to_dict())
            state_dict = sae.state_dict(keep_vars=True)
        architecture = sae.saved_architecture() if isinstance(sae, MatryoshkaSAE) else cfg_dict["architecture"]
        if architecture not in KINDS:
            raise TypeError(
                f"Levels can be given to SAEs of the architectures {', '.join(SAVED_AS)}, not to a "
                f"{type(sae).__name__} (architecture {architecture!r})."
            )
        widths = level_widths({**cfg_dict, "architecture": architecture}, widths)
        kind, config_class = KINDS[architecture]
        kept = {f.name: cfg_dict[f.name] for f in fields(config_class) if f.name in cfg_dict}
        metadata, dtype = SAEMetadata.from_dict(cfg_dict["metadata"]), dtype_to_str(state_dict["W_dec"].dtype)
        kept.update(metadata=metadata, dtype=dtype, device="meta", matryoshka_widths=widths)
        matryoshka_sae = kind(config_class(**kept))
        matryoshka_sae.load_state_dict(state_dict, assign=True)
        check_finite(matryoshka_sae.named_parameters())
        matryoshka_sae.cfg.device = sae.cfg.device
        matryoshka_sae.device = sae.device
        return matryoshka_sae

    @override
    @classmethod
    def load_from_disk(  # type: ignore[override]
        cls,
        path: str | Path,
        device: str = "cpu",
        dtype: str | None = None,
        converter: PretrainedSaeDiskLoader = sae_lens_disk_loader,
        fold_W_dec_norm: bool = False,
        widths: Sequence[int] | None = None,
    ) -> "MatryoshkaSAE":
        """Load from a folder that SAELens or this plugin has saved, with ``widths`` if it was saved without them.

        Raises:
            ValueError: If the widths are neither given nor recorded, or the files are damaged or contradict each other.
        """
        return cls.from_sae(load_saved_sae(path, device, dtype, converter, fold_W_dec_norm), widths)

    @override
    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        release: str,
        sae_id: str,
        device: str = "cpu",
        dtype: str = "float32",
        force_download: bool = False,
        converter: PretrainedSaeHuggingfaceLoader | None = None,
        fold_W_dec_norm: bool = False,
        widths: Sequence[int] | None = None,
    ) -> "MatryoshkaSAE":
        """Load from the Hugging Face Hub: as ``SAE.from_pretrained``, plus ``widths``, for SAEs published without them.

        ``release`` may be a repository ``user/name`` too.

        Raises:
            ValueError: If the widths are neither given, recorded nor known (:mod:`saved.known_releases`), the release
                or id is unknown, the Hub cannot be reached, or the files are damaged or contradict each other.
        """
        return cls.from_pretrained_with_cfg_and_sparsity(
            release, sae_id, device, dtype, force_download, converter, fold_W_dec_norm, widths
        )[0]

    @override
    @classmethod
    def from_pretrained_with_cfg_and_sparsity(  # type: ignore[override]
        cls,
        release: str,
        sae_id: str,
        device: str = "cpu",
        dtype: str = "float32",
        force_download: bool = False,
        converter: PretrainedSaeHuggingfaceLoader | None = None,
        fold_W_dec_norm: bool = False,
        widths: Sequence[int] | None = None,
    ) -> "tuple[MatryoshkaSAE, dict[str, Any], Tensor | None]":
        """As :meth:`from_pretrained`, with the published config and log sparsity beside the SAE."""
        sae, cfg_dict, log_sparsity = load_published_sae(
            release, sae_id, device, dtype, force_download, converter, fold_W_dec_norm
        )
        return cls.from_sae(sae, widths), cfg_dict, log_sparsity

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_loading(state_dict)
        if set(state_dict) - {name for name, _ in self.named_parameters()}:
            raise ValueError(
                "This folder is a training checkpoint, not a saved SAE. Load it with "
                "TrainingSAE.load_from_disk(path) and convert it with MatryoshkaSAE.from_sae(training_sae)."
            )

    def _finish_levels(self, levels: Float[Tensor, "n_levels *batch d_in"]) -> Float[Tensor, "n_levels *batch d_in"]:
        # SAELens drops the input's statistics as it undoes the normalization, so that is done for all levels at once
        return self.reshape_fn_out(self.run_time_activation_norm_fn_out(levels), self.d_head)

    def _width(self, level: int | None) -> int:
        return self.cfg.d_sae if level is None else self.widths[level_index(level, self.widths)]
