"""One class of Matryoshka SAE for each SAELens architecture that Matryoshka SAEs are saved as."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig, StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig
from sae_lens.saes.topk_sae import TopK
from torch import Tensor
from typing_extensions import override

from sae_lens_matryoshka.saes.kinds import KINDS
from sae_lens_matryoshka.saes.matryoshka_sae import MatryoshkaSAE, MatryoshkaSAEConfig
from sae_lens_matryoshka.saes.plugin_sae import PluginSAE


class _SharedStorageSAE(PluginSAE):
    """A level cut out of a Matryoshka SAE: a plain SAE on views of that SAE's parameters."""

    @override
    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving(state_dict)
        # safetensors does not write views, and a level's encoder columns are one
        for name, tensor in state_dict.items():
            state_dict[name] = tensor.contiguous()


class LevelJumpReLUSAE(_SharedStorageSAE, JumpReLUSAE):
    """A level of a :class:`MatryoshkaJumpReLUSAE`."""


class LevelTopKSAE(_SharedStorageSAE, TopKSAE):
    """A level of a :class:`MatryoshkaTopKSAE`."""


class LevelStandardSAE(_SharedStorageSAE, StandardSAE):
    """A level of a :class:`MatryoshkaStandardSAE`."""


@dataclass
class MatryoshkaJumpReLUSAEConfig(MatryoshkaSAEConfig, JumpReLUSAEConfig):
    """Configuration of a Matryoshka SAE with one threshold a latent: JumpReLU's fields and ``matryoshka_widths``."""


class MatryoshkaJumpReLUSAE(MatryoshkaSAE, JumpReLUSAE):
    """A Matryoshka SAE trained with BatchTopK or JumpReLU. Level l's encoding is the first w_l of the full one."""

    cfg: MatryoshkaJumpReLUSAEConfig  # type: ignore[assignment]
    level_class = LevelJumpReLUSAE
    level_config_class = JumpReLUSAEConfig

    @override
    def _activate(self, hidden_pre: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        fires = hidden_pre > self.threshold[: hidden_pre.shape[-1]]
        return self.activation_fn(hidden_pre) * fires.to(hidden_pre.dtype)


@dataclass
class MatryoshkaStandardSAEConfig(MatryoshkaSAEConfig, StandardSAEConfig):
    """Configuration of a Matryoshka SAE with ReLU: the standard SAE's fields and ``matryoshka_widths``."""


class MatryoshkaStandardSAE(MatryoshkaSAE, StandardSAE):
    """A Matryoshka SAE trained with ReLU and L1. Level l's encoding is the first w_l of the full one."""

    cfg: MatryoshkaStandardSAEConfig  # type: ignore[assignment]
    level_class = LevelStandardSAE
    level_config_class = StandardSAEConfig

    @override
    def _activate(self, hidden_pre: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        return self.activation_fn(hidden_pre)


@dataclass
class MatryoshkaTopKSAEConfig(MatryoshkaSAEConfig, TopKSAEConfig):
    """Configuration of a Matryoshka SAE with TopK: the TopK SAE's fields and ``matryoshka_widths``."""


class MatryoshkaTopKSAE(MatryoshkaSAE, TopKSAE):
    """A Matryoshka SAE trained with TopK.

    A level stands alone: it fires the k largest of its own latents (all of them if it has fewer). So its encoding is
    not the first w_l entries of the full one, in which larger latents of other levels take some of the k places. In
    training it is: there a level reconstructs from its part of the full selection, which ``decode_levels(encode(x))``
    shows.
    """

    cfg: MatryoshkaTopKSAEConfig  # type: ignore[assignment]
    level_class = LevelTopKSAE
    level_config_class = TopKSAEConfig

    @override
    def encode_levels(self, x: Float[Tensor, "*batch d_in"]) -> list[Float[Tensor, "*batch width"]]:
        hidden_pre = self.hook_sae_acts_pre(self.process_sae_in(x) @ self.W_enc + self.b_enc)
        inner = [self._activate(hidden_pre[..., :width]) for width in self.widths[:-1]]
        return [*inner, self.hook_sae_acts_post(self._activate(hidden_pre))]

    @override
    def decode_each_level(
        self, level_acts: Sequence[Float[Tensor, "*batch width"]]
    ) -> Float[Tensor, "n_levels *batch d_in"]:
        return self._finish_levels(
            torch.stack([self._coefficients(acts) @ self.W_dec[: acts.shape[-1]] + self.b_dec for acts in level_acts])
        )

    @override
    def _activate(self, hidden_pre: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        width = hidden_pre.shape[-1]
        if self.cfg.rescale_acts_by_decoder_norm:
            hidden_pre = hidden_pre * self.W_dec[:width].norm(dim=-1)
        return TopK(min(self.cfg.k, width))(hidden_pre)

    @override
    def _coefficients(self, feature_acts: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        if not self.cfg.rescale_acts_by_decoder_norm:
            return feature_acts
        return feature_acts * (1 / self.W_dec[: feature_acts.shape[-1]].norm(dim=-1))


for _kind, _config_class in (
    (MatryoshkaJumpReLUSAE, MatryoshkaJumpReLUSAEConfig),
    (MatryoshkaTopKSAE, MatryoshkaTopKSAEConfig),
    (MatryoshkaStandardSAE, MatryoshkaStandardSAEConfig),
):
    KINDS[_kind.saved_architecture()] = (_kind, _config_class)
