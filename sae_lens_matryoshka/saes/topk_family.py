"""What the variants that select their latents share: BatchTopK and TopK, with the auxiliary loss for dead latents."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor
from typing_extensions import override

from sae_lens_matryoshka.ops.auxiliary_loss import auxiliary_loss
from sae_lens_matryoshka.ops.encoder import selected_hidden_pre
from sae_lens_matryoshka.ops.nested_loss import NestedErrors
from sae_lens_matryoshka.ops.selection import Selection
from sae_lens_matryoshka.saes.nested_training_config import NestedTrainingSAEConfig, validate_k
from sae_lens_matryoshka.saes.nested_training_sae import NestedTrainingSAE, level_dead
from sae_lens_matryoshka.saes.normalized_samples import SAMPLE_NORMALIZATIONS
from sae_lens_matryoshka.saes.training_step import Encoding, Prefixes


@dataclass
class TopKFamilyTrainingSAEConfig(NestedTrainingSAEConfig, TopKTrainingSAEConfig):  # pyright: ignore[reportIncompatibleVariableOverride] # one word more
    """Fields of the variants that select their latents.

    Args:
        k_start (float | None): The k of the first step, from which it falls linearly to ``k`` (Llama Scope,
            arXiv:2410.20526, section 3). None keeps ``k`` all the time.
        k_anneal_steps (int | None): After how many steps it has fallen to ``k``. None takes the whole run, as this
            plugin's ``train`` sets it; under SAELens's own runners, say it.
        use_matryoshka_aux_loss (bool): Whether dead latents reconstruct the error of their own level rather than of
            the whole SAE, as in SAELens's ``matryoshka_batchtopk``.
    """

    use_matryoshka_aux_loss: bool = False
    k_start: float | None = None
    k_anneal_steps: int | None = None

    def __post_init__(self) -> None:
        if self.k_start is not None:
            validate_k(self.k_start, self.d_sae, name="k_start")
            if self.k_start <= self.k:
                raise ValueError(f"k_start={self.k_start} must be above k={self.k}, to which it falls; or drop it.")
        steps = self.k_anneal_steps
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
            raise ValueError(f"k_anneal_steps={steps!r} must be a whole number of at least 1.")
        if steps is not None and self.k_start is None:
            raise ValueError(f"k_anneal_steps={steps} is for k_start, which is not set; set it, or drop this.")
        super().__post_init__()

    def k_at(self, n_training_steps: int) -> float:
        """The k of a training step, the first one being 0.

        Raises:
            ValueError: If ``k_start`` is set and it is not known how long k falls.
        """
        if self.k_start is None:
            return self.k
        if self.k_anneal_steps is None:
            raise ValueError(
                f"k_start={self.k_start} under a runner that is not this plugin's: set k_anneal_steps to the number of "
                f"steps in which k is to fall."
            )
        return self.k_start + (self.k - self.k_start) * min(1.0, n_training_steps / self.k_anneal_steps)


class TopKFamilyTrainingSAE(NestedTrainingSAE, TopKTrainingSAE):
    """A Matryoshka SAE in training whose latents are the largest, of a batch or of each sample."""

    cfg: TopKFamilyTrainingSAEConfig  # type: ignore[assignment]
    selection_guess: Float[Tensor, ""]

    def __init__(self, cfg: TopKFamilyTrainingSAEConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        # float64, so that saving and loading do not move it
        self._register_statistic("selection_guess", torch.zeros((), dtype=torch.float64))

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        selection: Any = self.activation_fn
        if self.cfg.k_start is not None:
            # where SAELens's own step reads it
            selection.k = self._whole(self.cfg.k_at(step_input.n_training_steps))
        output = super().training_forward_pass(step_input)
        if self.cfg.k_start is not None:
            output.metrics["k"] = selection.k
        return output

    def _whole(self, k: float) -> float:
        """The number of latents as the variant takes it."""
        return k

    @property
    def _k(self) -> float:
        """The k of the present step."""
        selection: Any = self.activation_fn
        return selection.k

    @abstractmethod
    def _select(self, x: Float[Tensor, "batch d_in"], decoder_norms: Float[Tensor, " d_sae"] | None) -> Selection:
        """The latents to keep, by pre-activation times decoder norm."""

    @override
    def _encode(self, x: Float[Tensor, "batch d_in"], prefixes: Prefixes) -> Encoding:
        selection = self._select(x.detach(), self._decoder_norms())
        latents = prefixes.lay_out(selection, x.shape[0])
        # SAELens multiplies selected pre-activations by the decoder norms and divides by them again: they cancel
        hidden_pre = selected_hidden_pre(x, self.W_enc, self.b_enc, self._subtracted_b_dec(), latents)
        return Encoding(x, prefixes, latents, hidden_pre, hidden_pre, latents.to_sparse(latents.scores))

    @override
    def _penalties(
        self,
        step_input: TrainStepInput,
        encoding: Encoding,
        errors: NestedErrors,
        row_scale: Float[Tensor, "batch 1"] | None,
    ) -> dict[str, Tensor]:
        x = encoding.x
        loss = x.new_zeros(())
        dead_mask = step_input.dead_neuron_mask
        if dead_mask is not None:
            parameters = (x, self.W_enc, self.b_enc, self.W_dec, self._subtracted_b_dec())
            residuals, dead_of_levels = [errors.residual], [dead_mask.nonzero().squeeze(1)]
            if errors.level_residuals is not None and self.cfg.use_matryoshka_aux_loss:
                residuals, dead_of_levels = errors.level_residuals, level_dead(dead_mask, encoding.prefixes)
            norms = self._decoder_norms() if any(dead.numel() for dead in dead_of_levels) else None
            for residual, dead in zip(residuals, dead_of_levels, strict=True):
                loss = loss + auxiliary_loss(*parameters, -residual, dead, norms, row_scale)
        return {"auxiliary_reconstruction_loss": self.cfg.aux_loss_coefficient * loss}

    @property
    @override
    def _needs_level_residuals(self) -> bool:
        return self.cfg.use_matryoshka_aux_loss

    @override
    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        """SAELens's auxiliary loss; ours where SAELens has none: for each prefix, and for normalized samples."""
        if not self.cfg.use_matryoshka_aux_loss and self.cfg.normalize_activations not in SAMPLE_NORMALIZATIONS:
            loss = self.calculate_topk_aux_loss(step_input.sae_in, sae_out, hidden_pre, step_input.dead_neuron_mask)
            return {"auxiliary_reconstruction_loss": loss}
        with torch.no_grad():
            prefixes = self.prefixes(step_input.n_training_steps)
            x = self.process_sae_in(step_input.sae_in)
            _, row_scale = self._target_before_normalization_is_undone(step_input.sae_in)
            residuals = torch.stack(self._reconstructions(feature_acts, prefixes)) - step_input.sae_in
            if row_scale is not None:
                residuals = residuals / row_scale
            zero = residuals.new_zeros(())
            errors = NestedErrors(zero, zero, residuals[-1], residuals)
        encoding = Encoding(x, prefixes, prefixes.lay_out_dense(x.shape[0]), hidden_pre, hidden_pre, feature_acts)
        return self._penalties(step_input, encoding, errors, row_scale)

    @override
    def _decoder_scale(self) -> Float[Tensor, " d_sae"] | None:
        return 1 / self.W_dec.norm(dim=-1) if self.cfg.rescale_acts_by_decoder_norm else None

    def _decoder_norms(self) -> Float[Tensor, " d_sae"] | None:
        return self.W_dec.detach().norm(dim=-1) if self.cfg.rescale_acts_by_decoder_norm else None
