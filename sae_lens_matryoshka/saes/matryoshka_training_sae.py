"""Training a Matryoshka SAE: SAELens's Matryoshka BatchTopK, computed from the non-zeros only.

Data of a step: activations -> encoder and BatchTopK -> the squared error of each level -> their weighted sum plus the
auxiliary loss for dead latents. Beside it the smallest selected activation feeds the running threshold, with which the
SAE is saved as a JumpReLU SAE. ``ops/`` computes it; where that cannot serve (``training_path`` says when and why)
SAELens's own code does.
"""

from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from sae_lens import MatryoshkaBatchTopKTrainingSAE
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput, mse_loss
from torch import Tensor
from typing_extensions import override

from sae_lens_matryoshka.ops.auxiliary_loss import auxiliary_loss, matryoshka_auxiliary_loss
from sae_lens_matryoshka.ops.encoder import selected_hidden_pre
from sae_lens_matryoshka.ops.latents import lay_out
from sae_lens_matryoshka.ops.nested_loss import NestedErrors, nested_errors, nested_errors_reference
from sae_lens_matryoshka.ops.selection import select_batch_topk
from sae_lens_matryoshka.saes.matryoshka_training_config import MatryoshkaTrainingSAEConfig


class TrainingPath(NamedTuple):
    """Which of two ways a training step is computed; the results are the same."""

    fast: bool
    """Whether by ``ops/``, from the non-zeros only. Otherwise by SAELens's own dense code."""

    reason: str
    """Why."""


class MatryoshkaTrainingSAE(MatryoshkaBatchTopKTrainingSAE):
    """A Matryoshka SAE in training, saved for inference as a JumpReLU SAE whose metadata hold the widths.

    Differences to SAELens's ``matryoshka_batchtopk``: the same step at a fraction of the time and memory, level
    weights, figures for every level on logging steps, a running threshold that is unbiased from the first step, and
    training with ``normalize_activations`` of every kind.

    ``W_enc`` is kept in memory column by column, which makes gathering columns and writing their gradient fast. Its
    shape and saved form are SAELens's.
    """

    cfg: MatryoshkaTrainingSAEConfig  # type: ignore[assignment]
    topk_threshold_updates: Tensor

    def __init__(self, cfg: MatryoshkaTrainingSAEConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        self.register_buffer("topk_threshold_updates", torch.zeros((), dtype=torch.long, device=self.W_dec.device))
        self._last_smallest_score = 0.0
        self._keep_activation_statistics()

    @property
    def training_path(self) -> TrainingPath:
        """Which way the next training step takes, and why."""
        if torch.compiler.is_compiling():
            return TrainingPath(False, "the step is compiled (compile_sae), which sparse kernels do not allow")
        if self.dtype not in (torch.float32, torch.float64):
            return TrainingPath(False, f"sparse kernels need float32 or float64 parameters, not {self.dtype}")
        if self.mse_loss_fn is not mse_loss:
            return TrainingPath(False, "mse_loss_fn has been replaced")
        hooked = [name for name, hook in self.hook_dict.items() if hook.has_hooks(including_permanent=True)]
        if hooked:
            return TrainingPath(False, f"hooks are attached, which see dense tensors: {', '.join(hooked)}")
        return TrainingPath(True, "nothing stands against it")

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """One training step's losses, in the same names as SAELens gives them.

        ``losses`` holds every level's mean squared error unweighted (``mse_loss`` for the full width,
        ``inner_mse_loss_<width>`` for the others), so that runs with different level weights compare; ``loss`` is
        their weighted sum plus the auxiliary loss. On the fast path only ``loss`` carries a gradient, and
        ``feature_acts`` and ``hidden_pre`` are sparse and hold the selected latents only.

        Args:
            step_input: What SAELens's trainer hands over; ``sae_in`` has shape (batch, d_in).

        Raises:
            ValueError: If the input or the loss is not finite. Parameters and threshold are untouched then.
        """
        sae_in = step_input.sae_in
        compiling = torch.compiler.is_compiling()
        if not compiling and not sae_in.isfinite().all():
            raise ValueError(
                f"Training step {step_input.n_training_steps}: the input activations hold "
                f"{int((~sae_in.isfinite()).sum())} values that are not finite, of {sae_in.numel()}."
            )
        fast = self.training_path.fast and sae_in.ndim == 2 and not sae_in.requires_grad
        output = self._fast_forward_pass(step_input) if fast else super().training_forward_pass(step_input)
        level_losses = [output.losses[_mse_loss_name(width, self.cfg.d_sae)] for width in self.cfg.matryoshka_widths]
        if not fast and self.cfg.level_weights is not None:
            # SAELens has counted every level once
            for weight, level_loss in zip(self.cfg.level_weights, level_losses, strict=True):
                output.loss = output.loss + (weight - 1) * level_loss
        if not compiling and not output.loss.isfinite():
            raise ValueError(
                f"Training step {step_input.n_training_steps}: the loss is {output.loss.item()}; the input's largest "
                f"absolute value is {sae_in.abs().max().item():.4g}, its mean norm {sae_in.norm(dim=-1).mean():.4g}."
            )
        if fast:  # SAELens's own pass has done so
            self._move_topk_threshold(output.feature_acts.values())
            output.metrics["topk_threshold"] = self.topk_threshold
        if step_input.is_logging_step:
            output.metrics.update(self._level_metrics(step_input, output.feature_acts, level_losses))
        return output

    def _fast_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """SAELens's losses with ``ops/`` in place of dense products."""
        cfg = self.cfg
        self._store_encoder_by_column()
        x = self.process_sae_in(step_input.sae_in)
        decoder_norms = self.W_dec.detach().norm(dim=-1) if cfg.rescale_acts_by_decoder_norm else None
        n_selected = int(cfg.k * x.shape[0])
        selection = select_batch_topk(
            x.detach(), self.W_enc.detach(), self.b_enc.detach(), decoder_norms, n_selected, self._last_smallest_score
        )
        latents = lay_out(selection, x.shape[0], cfg.matryoshka_widths)
        # SAELens multiplies selected pre-activations by the decoder norms and divides by them again: they cancel
        coefficients = selected_hidden_pre(
            x, self.W_enc, self.b_enc, self.b_dec if cfg.apply_b_dec_to_input else None, latents
        )
        target, row_scale = self._target_before_normalization_is_undone(step_input.sae_in)
        errors = nested_errors(
            coefficients,
            self.W_dec,
            self.b_dec,
            target,
            latents,
            cfg.level_weights,
            row_scale,
            keep_level_residuals=cfg.use_matryoshka_aux_loss,
        )
        losses = {"mse_loss": errors.squared_errors[-1]}
        losses.update(self._auxiliary_loss(x, errors, step_input.dead_neuron_mask, decoder_norms, row_scale))
        for width, squared_error in zip(cfg.matryoshka_widths[:-1], errors.squared_errors, strict=False):
            losses[_mse_loss_name(width, cfg.d_sae)] = squared_error
        error = errors.residual if row_scale is None else errors.residual * row_scale
        return TrainStepOutput(
            sae_in=step_input.sae_in,
            sae_out=step_input.sae_in + error,
            feature_acts=latents.to_sparse(latents.scores),
            hidden_pre=latents.to_sparse(latents.hidden_pre),
            loss=errors.loss + losses["auxiliary_reconstruction_loss"],
            losses=losses,
        )

    def _auxiliary_loss(
        self,
        x: Float[Tensor, "batch d_in"],
        errors: NestedErrors,
        dead_mask: Tensor | None,
        decoder_norms: Float[Tensor, " d_sae"] | None,
        row_scale: Float[Tensor, "batch 1"] | None,
    ) -> dict[str, Tensor]:
        """SAELens's auxiliary loss by its name."""
        loss = x.new_zeros(())
        if dead_mask is not None:
            subtracted_b_dec = self.b_dec if self.cfg.apply_b_dec_to_input else None
            parameters = (x, self.W_enc, self.b_enc, self.W_dec, subtracted_b_dec)
            if errors.level_residuals is not None and self.cfg.use_matryoshka_aux_loss:
                loss = matryoshka_auxiliary_loss(
                    *parameters,
                    -errors.level_residuals,
                    dead_mask,
                    self.cfg.matryoshka_widths,
                    decoder_norms,
                    row_scale,
                )
            else:
                dead = dead_mask.nonzero().squeeze(1)
                loss = auxiliary_loss(*parameters, -errors.residual, dead, decoder_norms, row_scale)
        return {"auxiliary_reconstruction_loss": self.cfg.aux_loss_coefficient * loss}

    @override
    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        """SAELens's auxiliary loss, also for the normalizations of each sample, which SAELens refuses."""
        if self.cfg.normalize_activations not in _SAMPLE_NORMALIZATIONS:
            return super().calculate_aux_loss(step_input, feature_acts, hidden_pre, sae_out)
        x = self.process_sae_in(step_input.sae_in)
        norms = self.W_dec.norm(dim=-1)
        coefficients = feature_acts / norms if self.cfg.rescale_acts_by_decoder_norm else feature_acts
        target, row_scale = self._target_before_normalization_is_undone(step_input.sae_in)
        errors = nested_errors_reference(coefficients, self.W_dec, self.b_dec, target, self.cfg.matryoshka_widths)
        column_scale = norms.detach() if self.cfg.rescale_acts_by_decoder_norm else None
        return self._auxiliary_loss(x, errors, step_input.dead_neuron_mask, column_scale, row_scale)

    @override
    @torch.no_grad()
    def update_topk_threshold(self, acts_topk: Float[Tensor, "batch d_sae"]) -> None:
        self._move_topk_threshold(acts_topk[acts_topk > 0])

    @torch.no_grad()
    def _move_topk_threshold(self, positive_acts: Float[Tensor, " n"]) -> None:
        """Move the running threshold towards the smallest selected activation of this batch.

        SAELens averages from a start value of 0, which for hundreds of steps keeps the threshold far too low. Dividing
        the average by the weight it has gathered so far, as Adam does (Kingma & Ba, arXiv:1412.6980, section 3),
        removes the start value. Written as a step towards the new value, that is a learning rate which starts at 1
        and falls to ``topk_threshold_lr``.
        """
        if positive_acts.numel() == 0:
            return
        self.topk_threshold_updates = self.topk_threshold_updates + 1
        lr = self.cfg.topk_threshold_lr
        unbiased_lr = lr / (1 - (1 - lr) ** self.topk_threshold_updates.to(self.topk_threshold.dtype))
        # autocast would round the threshold to bfloat16
        with torch.autocast(self.topk_threshold.device.type, enabled=False):
            min_positive = positive_acts.min().to(self.topk_threshold.dtype)
            self.topk_threshold = self.topk_threshold + unbiased_lr * (min_positive - self.topk_threshold)
        if not torch.compiler.is_compiling():
            self._last_smallest_score = min_positive.item()

    @override
    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving(state_dict)
        state_dict["W_enc"] = state_dict["W_enc"].contiguous()

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving_inference(state_dict)
        del state_dict["topk_threshold_updates"]
        state_dict["W_enc"] = state_dict["W_enc"].contiguous()

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_loading(state_dict)
        # SAELens's own matryoshka_batchtopk checkpoints lack the count
        state_dict.setdefault("topk_threshold_updates", torch.zeros((), dtype=torch.long))

    def _store_encoder_by_column(self) -> None:
        if not self.W_enc.t().is_contiguous():
            self.W_enc.data = self.W_enc.data.t().contiguous().t()

    def _keep_activation_statistics(self) -> None:
        """Undo a sample's normalization as often as there are levels.

        SAELens deletes the statistics as it undoes the normalization for the first time, so that its Matryoshka class
        fails on its first step with ``layer_norm`` and ``constant_norm_rescale``.
        """
        undo_once = self.run_time_activation_norm_fn_out

        def undo(x: Tensor) -> Tensor:
            statistics = {name: getattr(self, name) for name in _SAMPLE_STATISTICS if hasattr(self, name)}
            undone = undo_once(x)
            for name, value in statistics.items():
                setattr(self, name, value)
            return undone

        if self.cfg.normalize_activations in _SAMPLE_NORMALIZATIONS:
            self.run_time_activation_norm_fn_out = undo

    def _target_before_normalization_is_undone(
        self, sae_in: Float[Tensor, "batch d_in"]
    ) -> tuple[Float[Tensor, "batch d_in"], Float[Tensor, "batch 1"] | None]:
        """What the decoder must produce so that undoing the normalization gives ``sae_in``.

        Undoing it multiplies by the row scale (the second value, None for 1) and adds a mean, so an error of the
        decoder counts row scale times in the loss.
        """
        sae_in = sae_in.to(self.dtype)
        if self.cfg.normalize_activations == "layer_norm":
            mean, row_scale = cast(Tensor, self.ln_mu), cast(Tensor, self.ln_std)
            return torch.where(row_scale > 0, (sae_in - mean) / row_scale, 0.0), row_scale
        if self.cfg.normalize_activations == "constant_norm_rescale":
            coefficient = cast(Tensor, self.x_norm_coeff)
            return sae_in * coefficient, 1 / coefficient
        return sae_in, None

    @torch.no_grad()
    def _level_metrics(
        self, step_input: TrainStepInput, feature_acts: Float[Tensor, "batch d_sae"], level_losses: list[Tensor]
    ) -> dict[str, Tensor]:
        """Fraction of variance unexplained, L0 and number of dead latents of each level, on this batch."""
        sae_in = step_input.sae_in.to(torch.promote_types(step_input.sae_in.dtype, torch.float32))
        total_variance = (sae_in - sae_in.mean(0)).pow(2).sum(-1).mean()
        n_firings = feature_acts.bool().float().sum(0).to_dense()
        metrics: dict[str, Tensor] = {}
        for width, level_loss in zip(self.cfg.matryoshka_widths, level_losses, strict=True):
            metrics[f"fvu_level_{width}"] = level_loss / total_variance
            metrics[f"l0_level_{width}"] = n_firings[:width].sum() / sae_in.shape[0]
            if step_input.dead_neuron_mask is not None:
                metrics[f"dead_level_{width}"] = step_input.dead_neuron_mask[:width].sum()
        return metrics


_SAMPLE_NORMALIZATIONS = ("layer_norm", "constant_norm_rescale")
_SAMPLE_STATISTICS = ("ln_mu", "ln_std", "x_norm_coeff")


def _mse_loss_name(width: int, d_sae: int) -> str:
    """SAELens's name for the loss of the level of this width."""
    return "mse_loss" if width == d_sae else f"inner_mse_loss_{width}"
