"""Using a trained Matryoshka SAE: a JumpReLU SAE whose levels can be encoded, decoded, compared and cut out.

With one threshold a latent, level l's encoding is exactly the first w_l entries of the full one, so every level is a
slice of the same parameters and none needs retraining.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    PretrainedSaeDiskLoader,
    PretrainedSaeHuggingfaceLoader,
)
from sae_lens.loading.pretrained_sae_loaders import sae_lens_disk_loader
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor, nn
from typing_extensions import override

from sae_lens_matryoshka.levels import level_index, level_of, validate_widths


@dataclass
class MatryoshkaSAEConfig(JumpReLUSAEConfig):
    """Configuration of a Matryoshka SAE for inference.

    Args:
        matryoshka_widths (list[int]): The number of latents of each level, smallest level first, the last one d_sae.
        d_in (int): Width of the activations. Inherited from SAEConfig.
        d_sae (int): Number of latents. Inherited from SAEConfig.
        dtype (str): Data type of the parameters. Inherited from SAEConfig.
        device (str): Device of the parameters. Inherited from SAEConfig.
        apply_b_dec_to_input (bool): Whether the decoder bias is subtracted from the input. Inherited from SAEConfig.
        normalize_activations (str): Normalization of the input. Inherited from SAEConfig.
        reshape_activations (str): How attention heads are reshaped. Inherited from SAEConfig.
        metadata (SAEMetadata): What the SAE was trained on. Inherited from SAEConfig.
    """

    matryoshka_widths: list[int] = field(default_factory=list)

    @override
    @classmethod
    def architecture(cls) -> str:
        return "matryoshka"

    def __post_init__(self) -> None:
        self.matryoshka_widths = validate_widths(self.matryoshka_widths, self.d_sae)
        super().__post_init__()


class MatryoshkaSAE(JumpReLUSAE):
    """A JumpReLU SAE with levels. Wherever SAELens takes an SAE it takes this one, as the full level.

    Levels are named by index: 0 is the smallest, -1 the full dictionary. An index that does not exist is an
    ``IndexError`` that lists the levels.
    """

    cfg: MatryoshkaSAEConfig  # type: ignore[assignment]

    def __init__(self, cfg: MatryoshkaSAEConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)

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

    @override
    def encode(self, x: Float[Tensor, "*batch d_in"], level: int | None = None) -> Float[Tensor, "*batch width"]:
        """Latent activations of one level; None means all ``d_sae`` of them.

        Only the columns of that level are computed. Equals ``encode(x)[..., :width]``.

        Args:
            x: Activations of the model, shape (..., d_in).
            level: Index of the level.

        Raises:
            IndexError: If there is no such level.
        """
        width = self._width(level)
        sae_in = self.process_sae_in(x)
        hidden_pre = self.hook_sae_acts_pre(sae_in @ self.W_enc[:, :width] + self.b_enc[:width])
        fires = hidden_pre > self.threshold[:width]
        return self.hook_sae_acts_post(self.activation_fn(hidden_pre) * fires.to(hidden_pre.dtype))

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
        sae_out_pre = self.hook_sae_recons(feature_acts @ self.W_dec[:width] + self.b_dec)
        return self.reshape_fn_out(self.run_time_activation_norm_fn_out(sae_out_pre), self.d_head)

    def decode_levels(self, feature_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "n_levels *batch d_in"]:
        """Every level's reconstruction from the activations of all latents, for the price of the full one.

        Each level adds its own latents to the sum of the smaller ones. Hooks do not fire: they expect a single
        reconstruction.

        Args:
            feature_acts: Activations of all latents, as ``encode(x)`` returns them.

        Returns:
            A tensor of shape (n_levels, ..., d_in), smallest level first.
        """
        reconstruction = self.b_dec
        reconstructions: list[Tensor] = []
        narrower = 0
        for width in self.widths:
            reconstruction = reconstruction + feature_acts[..., narrower:width] @ self.W_dec[narrower:width]
            reconstructions.append(reconstruction)
            narrower = width
        # SAELens drops the input's statistics as it undoes the normalization, so that is done for all levels at once
        sae_out = self.run_time_activation_norm_fn_out(torch.stack(reconstructions))
        return self.reshape_fn_out(sae_out, self.d_head)

    def reconstruct_levels(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "n_levels *batch d_in"]:
        """Every level's reconstruction of ``x``, smallest level first: ``decode_levels(encode(x))``.

        Args:
            x: Activations of the model, shape (..., d_in).

        Returns:
            A tensor of shape (n_levels, ..., d_in).
        """
        return self.decode_levels(self.encode(x))

    def at_level(self, level: int) -> JumpReLUSAE:
        """One level as a standalone JumpReLU SAE, which SAELens saves, evaluates and attaches to models like any other.

        It shares storage with this SAE: changing the parameters of one in place changes the other. Its metadata say
        what it was cut from, under ``matryoshka_cut_from``, and keep the widths of the levels that it contains.

        Args:
            level: Index of the level.

        Raises:
            IndexError: If there is no such level.
        """
        index = level_index(level, self.widths)
        width = self.widths[index]
        kept = {f.name: getattr(self.cfg, f.name) for f in fields(JumpReLUSAEConfig)}
        metadata = copy.deepcopy(self.cfg.metadata)
        # figures of the full dictionary do not hold for a level
        for full_only in ("l0", "num_dead_features"):
            if full_only in metadata:
                delattr(metadata, full_only)
        metadata.matryoshka_widths = self.widths[: index + 1]
        metadata.matryoshka_cut_from = {"level": index, "d_sae": self.cfg.d_sae, "matryoshka_widths": self.widths}
        # on the meta device, since the parameters made there are replaced by this SAE's
        sae = LevelSAE(JumpReLUSAEConfig(**{**kept, "d_sae": width, "device": "meta", "metadata": metadata}))
        for name, parameter in (
            ("W_enc", self.W_enc[:, :width]),
            ("b_enc", self.b_enc[:width]),
            ("W_dec", self.W_dec[:width]),
            ("b_dec", self.b_dec),
            ("threshold", self.threshold[:width]),
        ):
            setattr(sae, name, nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad))
        sae.cfg.device = self.cfg.device
        sae.device = self.device
        return sae

    @classmethod
    def from_sae(cls, sae: SAE[Any], widths: Sequence[int] | None = None) -> "MatryoshkaSAE":
        """Give the levels back to an SAE.

        A JumpReLU SAE keeps its parameters, which are shared, not copied. A BatchTopK training SAE is converted as it
        would be for saving.

        Args:
            sae: A JumpReLU SAE, such as SAELens loads from a saved Matryoshka SAE, or one in training.
            widths: The level widths, for SAEs published without them; None reads them from the config or metadata.

        Raises:
            ValueError: If the widths are neither given nor recorded, or do not fit the SAE.
            TypeError: If levels cannot be given to this kind of SAE.
        """
        if isinstance(sae, BatchTopKTrainingSAE):
            cfg_dict = copy.deepcopy(sae.cfg.get_inference_sae_cfg_dict())
            state_dict = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
            sae.process_state_dict_for_saving_inference(state_dict)
        elif isinstance(sae, JumpReLUSAE):
            cfg_dict = copy.deepcopy(sae.cfg.to_dict())
            state_dict = sae.state_dict(keep_vars=True)
        else:
            raise TypeError(
                f"Levels need one fixed threshold a latent, which {type(sae).__name__} (architecture "
                f"{sae.cfg.architecture()!r}) does not have; pass a JumpReLU SAE or a BatchTopK training SAE."
            )
        if widths is None:
            widths = recorded_widths(cfg_dict)
        if widths is None:
            raise ValueError(
                f"This {cfg_dict['architecture']} SAE does not record its level widths. If it was trained as a "
                f"Matryoshka SAE, pass them: widths=[..., {cfg_dict['d_sae']}]."
            )
        kept = {f.name: cfg_dict[f.name] for f in fields(JumpReLUSAEConfig)}
        kept["metadata"] = SAEMetadata.from_dict(cfg_dict["metadata"])
        matryoshka_sae = cls(MatryoshkaSAEConfig(**{**kept, "device": "meta", "matryoshka_widths": list(widths)}))
        matryoshka_sae.load_state_dict(state_dict, assign=True)
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
        """Load from a folder that SAELens or this plugin has saved; as ``SAE.load_from_disk``, plus ``widths``.

        Args:
            path: The folder with ``cfg.json`` and ``sae_weights.safetensors``.
            device: The device to load to.
            dtype: The data type to load as; None keeps the saved one.
            converter: Reads other formats.
            fold_W_dec_norm: Whether to fold the decoder norms into the encoder.
            widths: The level widths, for SAEs saved without them.

        Raises:
            ValueError: If the widths are neither given nor recorded.
        """
        sae: SAE[Any] = SAE.load_from_disk(path, device, dtype, converter, fold_W_dec_norm)
        return cls.from_sae(sae, widths)

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
        """Load from the Hugging Face Hub; as ``SAE.from_pretrained``, plus ``widths``.

        Args:
            release: A release of SAELens's directory or a repository ``user/name``.
            sae_id: The SAE's id in the release, its folder in the repository.
            device: The device to load to.
            dtype: The data type to load as.
            force_download: Whether to download again what is cached.
            converter: Reads other formats.
            fold_W_dec_norm: Whether to fold the decoder norms into the encoder.
            widths: The level widths, for SAEs published without them.

        Raises:
            ValueError: If the widths are neither given nor recorded, or the release or id is unknown.
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
        sae, cfg_dict, log_sparsity = SAE.from_pretrained_with_cfg_and_sparsity(
            release, sae_id, device, dtype, force_download, converter, fold_W_dec_norm
        )
        return cls.from_sae(sae, widths), cfg_dict, log_sparsity

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_loading(state_dict)
        if "topk_threshold" in state_dict:
            raise ValueError(
                "This folder is a training checkpoint, not a saved SAE. Load it with "
                "TrainingSAE.load_from_disk(path) and convert it with MatryoshkaSAE.from_sae(training_sae)."
            )

    def _width(self, level: int | None) -> int:
        return self.cfg.d_sae if level is None else self.widths[level_index(level, self.widths)]


class LevelSAE(JumpReLUSAE):
    """A level cut out of a Matryoshka SAE: a plain JumpReLU SAE on views of that SAE's parameters."""

    @override
    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving(state_dict)
        # safetensors does not write views, and a level's encoder columns are one
        for name, tensor in state_dict.items():
            state_dict[name] = tensor.contiguous()


def recorded_widths(cfg_dict: dict[str, Any]) -> list[int] | None:
    """The level widths that an SAE's config records, or None.

    They stand in our own configs, in the metadata of levels cut out of an SAE, and in SAELens's metadata of how the
    SAE was trained (``training_architecture_details``).

    Args:
        cfg_dict: An SAE's config as ``cfg.to_dict()`` gives it.
    """
    metadata = cfg_dict.get("metadata") or {}
    training_details = metadata.get("training_architecture_details") or {}
    for source in (cfg_dict, metadata, training_details):
        if source.get("matryoshka_widths"):
            return list(source["matryoshka_widths"])
    return None
