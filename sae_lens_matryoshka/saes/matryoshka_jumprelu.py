"""Architecture ``matryoshka_jumprelu``: learned thresholds and an L0 penalty, saved as a JumpReLU SAE.

JumpReLU: Rajamanoharan et al., arXiv:2407.14435. Gemma Scope 2 trains Matryoshka SAEs of this kind with the quadratic
penalty around a target L0. With a single level it is SAELens's ``jumprelu``.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from sae_lens import JumpReLUSAEConfig, JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLU, Step, calculate_pre_act_loss
from sae_lens.saes.sae import SAEConfig, TrainStepInput, TrainStepOutput
from torch import Tensor
from typing_extensions import override

from sae_lens_matryoshka.ops.encoder import hidden_pre_of
from sae_lens_matryoshka.ops.latents import ActiveLatents
from sae_lens_matryoshka.saes.nested_training_config import NestedTrainingSAEConfig
from sae_lens_matryoshka.saes.thresholded_family import ThresholdedTrainingSAE
from sae_lens_matryoshka.saes.training_step import Encoding


@dataclass
class MatryoshkaJumpReLUTrainingSAEConfig(NestedTrainingSAEConfig, JumpReLUTrainingSAEConfig):  # pyright: ignore[reportIncompatibleVariableOverride] # one word more
    """Configuration for training a Matryoshka SAE with JumpReLU.

    The fields are those of SAELens's ``jumprelu`` and of :class:`NestedTrainingSAEConfig`. The sparsity penalty counts
    every latent once, whatever its level.

    Args:
        jumprelu_sparsity_loss_mode (str): ``step`` (arXiv:2407.14435), ``tanh`` (Anthropic) or ``quadratic`` (Gemma
            Scope 2, with ``target_l0``). Inherited from JumpReLUTrainingSAEConfig, like all its other fields.
        target_l0 (float | None): The L0 that the quadratic penalty pulls to. Inherited from JumpReLUTrainingSAEConfig.
        l0_coefficient (float): Weight of the sparsity penalty. Inherited from JumpReLUTrainingSAEConfig.
    """

    @override
    @classmethod
    def architecture(cls) -> str:
        return "matryoshka_jumprelu"

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return JumpReLUSAEConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        modes = ("step", "tanh", "quadratic")
        if self.jumprelu_sparsity_loss_mode not in modes:
            raise ValueError(
                f"jumprelu_sparsity_loss_mode={self.jumprelu_sparsity_loss_mode!r} must be one of {', '.join(modes)}."
            )
        if self.jumprelu_sparsity_loss_mode == "quadratic" and not 0 < (self.target_l0 or 0) <= self.d_sae:
            raise ValueError(
                f"target_l0={self.target_l0!r} must be above 0 and at most d_sae={self.d_sae} with "
                "jumprelu_sparsity_loss_mode='quadratic', which pulls the L0 to it; set it, for example to 50."
            )
        if not self.jumprelu_bandwidth > 0:
            raise ValueError(f"jumprelu_bandwidth={self.jumprelu_bandwidth!r} must be positive, such as 0.05.")


class MatryoshkaJumpReLUTrainingSAE(ThresholdedTrainingSAE, JumpReLUTrainingSAE):
    """A Matryoshka SAE in training with a learned threshold a latent."""

    cfg: MatryoshkaJumpReLUTrainingSAEConfig  # type: ignore[assignment]

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        # as in SAELens: below zero the gate would pass negative pre-activations
        self.threshold.data.clamp_(min=0.0)
        return super().training_forward_pass(step_input)

    @override
    def _floor(self) -> Float[Tensor, " d_sae"]:
        # latents within half a bandwidth below their threshold do not fire, but give it a gradient
        return (self.threshold - self.bandwidth / 2).to(self.dtype)

    @override
    def _activate(self, hidden_pre: Tensor, latent_ids: Int[Tensor, " n"] | None) -> Tensor:
        return self._gate(JumpReLU, hidden_pre, latent_ids)

    def _gate(
        self, gate: type[JumpReLU] | type[Step], hidden_pre: Tensor, latent_ids: Int[Tensor, " n"] | None
    ) -> Tensor:
        """One of SAELens's functions with a straight-through estimator, on a matrix or on entries."""
        threshold = self.threshold.to(hidden_pre.dtype)
        options = (self.bandwidth, self.cfg.jumprelu_ste_to_input)
        if latent_ids is None:
            return gate.apply(hidden_pre, threshold, *options)  # type: ignore[return-value]
        # entries as a matrix of one row, each with a threshold of its own
        return gate.apply(hidden_pre[None], threshold[latent_ids], *options)[0]  # type: ignore[index]

    @override
    def _listed_penalties(self, step_input: TrainStepInput, encoding: Encoding) -> dict[str, Tensor]:
        latents, cfg = encoding.latents, self.cfg
        assert isinstance(latents, ActiveLatents)
        if cfg.jumprelu_sparsity_loss_mode == "tanh":
            scaled = cfg.jumprelu_tanh_scale * encoding.coefficients * self.W_dec.norm(dim=1)[latents.columns]
            sample_losses = latents.row_sums(torch.tanh(scaled))
        else:
            l0 = latents.row_sums(self._gate(Step, encoding.hidden_pre, latents.columns))
            target_l0 = cfg.target_l0 or 1.0
            quadratic = cfg.jumprelu_sparsity_loss_mode == "quadratic"
            sample_losses = 2 / target_l0 * (l0 - target_l0) ** 2 if quadratic else l0
        losses = {"l0_loss": (step_input.coefficients["l0"] * sample_losses).mean()}
        if cfg.pre_act_loss_coefficient is not None:
            losses["pre_act_loss"] = self._pre_act_loss(step_input, encoding.x, cfg.pre_act_loss_coefficient)
        return losses

    def _pre_act_loss(
        self, step_input: TrainStepInput, x: Float[Tensor, "batch d_in"], coefficient: float
    ) -> Float[Tensor, ""]:
        """SAELens's loss that lifts dead latents, on the dead columns only."""
        if step_input.dead_neuron_mask is None or not step_input.dead_neuron_mask.any():
            return x.new_zeros(())
        dead = step_input.dead_neuron_mask.nonzero().squeeze(1)
        hidden_pre = hidden_pre_of(x, self.W_enc, self.b_enc, self._subtracted_b_dec(), dead)
        threshold = self.threshold.to(hidden_pre.dtype)[dead]
        all_dead = torch.ones_like(dead, dtype=torch.bool)
        return calculate_pre_act_loss(coefficient, threshold, hidden_pre, all_dead, self.W_dec.norm(dim=1)[dead])
