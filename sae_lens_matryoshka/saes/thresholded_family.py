"""What the variants share whose latents fire above a threshold of their own: JumpReLU and ReLU.

Nothing bounds how many latents fire: half of them at the start of training, a few dozen later. While few
pre-activations can matter, they are listed and the step is computed from them alone; while many do, whole matrices are
faster. Both are exact. Which one a step takes depends on the share that mattered in the step before.
"""

from abc import abstractmethod

import torch
from jaxtyping import Float, Int
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor
from typing_extensions import override

from sae_lens_matryoshka.ops.encoder import hidden_pre_of, selected_hidden_pre
from sae_lens_matryoshka.ops.latents import ActiveLatents
from sae_lens_matryoshka.ops.nested_loss import NestedErrors
from sae_lens_matryoshka.ops.selection import select_above
from sae_lens_matryoshka.saes.nested_training_config import NestedTrainingSAEConfig
from sae_lens_matryoshka.saes.nested_training_sae import NestedTrainingSAE
from sae_lens_matryoshka.saes.training_step import Encoding, Prefixes

LISTED_SHARE = 0.03
"""The share of all pre-activations up to which listing those that matter is faster (benchmarks/README.md)."""

SAMPLE_SIZE = 64
"""How many samples of a batch tell the share that matters while whole matrices are used."""


class ThresholdedTrainingSAE(NestedTrainingSAE):
    """A Matryoshka SAE in training whose latents fire where their pre-activation exceeds a threshold."""

    share_that_matters: Float[Tensor, ""]

    def __init__(self, cfg: NestedTrainingSAEConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        self._register_statistic("share_that_matters", torch.ones((), dtype=torch.float64))
        self._share_of_this_step: float | None = None

    @abstractmethod
    def _floor(self) -> Float[Tensor, " d_sae"]:
        """The pre-activation of each latent below which it neither fires nor gets a gradient."""

    @abstractmethod
    def _activate(self, hidden_pre: Tensor, latent_ids: Int[Tensor, " n"] | None) -> Tensor:
        """Activations from pre-activations: a matrix of all latents (None), or entries of the given latents."""

    @abstractmethod
    def _listed_penalties(self, step_input: TrainStepInput, encoding: Encoding) -> dict[str, Tensor]:
        """SAELens's auxiliary losses from listed entries."""

    def _can_list(self) -> bool:
        """Whether the penalties can be computed from listed entries."""
        return True

    @override
    def _encode(self, x: Float[Tensor, "batch d_in"], prefixes: Prefixes) -> Encoding:
        b_dec, floor, n_all = self._subtracted_b_dec(), self._floor().detach(), x.shape[0] * self.cfg.d_sae
        selection = None
        if self._can_list() and self.share_that_matters.item() <= LISTED_SHARE:
            most = int(2 * LISTED_SHARE * n_all)
            selection = select_above(x.detach(), self.W_enc.detach(), self.b_enc.detach(), floor, most)
        if selection is not None:
            self._share_of_this_step = selection.rows.numel() / n_all
            latents = prefixes.lay_out(selection, x.shape[0])
            hidden_pre = selected_hidden_pre(x, self.W_enc, self.b_enc, b_dec, latents)
            acts = self._activate(hidden_pre, latents.columns)
            return Encoding(x, prefixes, latents, hidden_pre, acts, latents.to_sparse(acts.detach()))
        hidden_pre = hidden_pre_of(x, self.W_enc, self.b_enc, b_dec)
        sample = hidden_pre.detach()[:SAMPLE_SIZE]
        self._share_of_this_step = (sample > floor).sum().item() / max(1, sample.numel())
        acts = self._activate(hidden_pre, None)
        return Encoding(x, prefixes, prefixes.lay_out_dense(x.shape[0]), hidden_pre, acts, acts.detach())

    @override
    def _after_step(self, output: TrainStepOutput) -> None:
        super()._after_step(output)
        if self._share_of_this_step is not None:  # the reference step counts nothing
            self.share_that_matters.fill_(self._share_of_this_step)

    @override
    def _penalties(
        self,
        step_input: TrainStepInput,
        encoding: Encoding,
        errors: NestedErrors,
        row_scale: Float[Tensor, "batch 1"] | None,
    ) -> dict[str, Tensor]:
        if isinstance(encoding.latents, ActiveLatents):
            return self._listed_penalties(step_input, encoding)
        losses = self.calculate_aux_loss(step_input, encoding.coefficients, encoding.hidden_pre, step_input.sae_in)
        assert isinstance(losses, dict)
        return losses
