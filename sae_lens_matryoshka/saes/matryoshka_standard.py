"""Architecture ``matryoshka_standard``: ReLU with an L1 penalty, saved as a standard SAE.

The kind that Nabeshima's Matryoshka SAEs are (https://sparselatents.com/matryoshka.html). With a single level it is
SAELens's ``standard``.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from sae_lens import StandardSAEConfig, StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.saes.sae import SAEConfig, TrainStepInput
from torch import Tensor
from typing_extensions import override

from sae_lens_matryoshka.ops.latents import ActiveLatents
from sae_lens_matryoshka.saes.nested_training_config import NestedTrainingSAEConfig
from sae_lens_matryoshka.saes.thresholded_family import ThresholdedTrainingSAE
from sae_lens_matryoshka.saes.training_step import Encoding, Prefixes


@dataclass
class MatryoshkaStandardTrainingSAEConfig(NestedTrainingSAEConfig, StandardTrainingSAEConfig):  # pyright: ignore[reportIncompatibleVariableOverride] # one word more
    """Configuration for training a Matryoshka SAE with ReLU and an L1 penalty.

    The fields are those of SAELens's ``standard`` and of :class:`NestedTrainingSAEConfig`.

    Args:
        l1_coefficient (float): Weight of the sparsity penalty. Inherited from StandardTrainingSAEConfig.
        l1_warm_up_steps (int): Steps over which that weight rises from 0. Inherited from StandardTrainingSAEConfig.
        lp_norm (float): The norm that is penalized. Inherited from StandardTrainingSAEConfig.
        l1_of_every_prefix (bool): Penalize the activations of every prefix, as Nabeshima does, so that early latents
            pay more often; otherwise every latent pays once, as in SAELens.
    """

    l1_of_every_prefix: bool = False

    @override
    @classmethod
    def architecture(cls) -> str:
        return "matryoshka_standard"

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return StandardSAEConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.l1_of_every_prefix and self.lp_norm != 1:
            raise ValueError(
                f"l1_of_every_prefix=True needs lp_norm=1, not {self.lp_norm}: only L1 norms of prefixes add up latent "
                "by latent; set lp_norm=1 or drop l1_of_every_prefix."
            )


class MatryoshkaStandardTrainingSAE(ThresholdedTrainingSAE, StandardTrainingSAE):
    """A Matryoshka SAE in training with ReLU and an L1 penalty."""

    cfg: MatryoshkaStandardTrainingSAEConfig  # type: ignore[assignment]

    @override
    def _can_list(self) -> bool:
        return self.cfg.lp_norm == 1

    @override
    def _floor(self) -> Float[Tensor, " d_sae"]:
        return torch.zeros_like(self.b_enc)

    @override
    def _activate(self, hidden_pre: Tensor, latent_ids: Int[Tensor, " n"] | None) -> Tensor:
        return hidden_pre.relu()

    @override
    def _listed_penalties(self, step_input: TrainStepInput, encoding: Encoding) -> dict[str, Tensor]:
        latents = encoding.latents
        assert isinstance(latents, ActiveLatents)
        cost = self._cost(encoding.prefixes)[latents.columns]
        sample_losses = latents.row_sums(encoding.coefficients * cost)
        return {"l1_loss": (step_input.coefficients["l1"] * sample_losses).mean()}

    @override
    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        """SAELens's L1 loss, or with ``l1_of_every_prefix`` the sum of those of all prefixes."""
        if not self.cfg.l1_of_every_prefix:
            return super().calculate_aux_loss(step_input, feature_acts, hidden_pre, sae_out)
        sparsity = feature_acts @ self._cost(self.prefixes(step_input.n_training_steps))
        return {"l1_loss": (step_input.coefficients["l1"] * sparsity).mean()}

    def _cost(self, prefixes: Prefixes) -> Float[Tensor, " d_sae"]:
        """What each latent pays for a unit of activation: its decoder norm, once or for each prefix it is in."""
        norms = self.W_dec.norm(dim=1)
        if not self.cfg.l1_of_every_prefix:
            return norms
        n_prefixes = torch.zeros_like(norms)
        for width in prefixes.widths:
            n_prefixes[prefixes.latent_ids(torch.arange(width, device=norms.device))] += 1
        return norms * n_prefixes
