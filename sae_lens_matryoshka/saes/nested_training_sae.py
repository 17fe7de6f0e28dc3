"""The training step that all Matryoshka variants share.

The data's way through it:

    sae_in -> process_sae_in       SAELens's own: data type, decoder bias, normalization
           -> _encode              the variant's: which latents are active, with what coefficients
           -> nested_errors        every prefix's error, their loss and its exact gradient (ops/)
           -> _penalties           the variant's: auxiliary or sparsity losses
           -> TrainStepOutput      what SAELens's trainer reads

Where ``ops/`` cannot serve (``training_path`` says when and why) the same losses are computed by their definition,
from SAELens's own step of the one-level twin.
"""

from abc import abstractmethod
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import TrainingSAE
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput, mse_loss
from torch import Tensor, nn
from typing_extensions import override

from sae_lens_matryoshka.ops.latents import ActiveLatents
from sae_lens_matryoshka.ops.nested_loss import NestedErrors, nested_errors
from sae_lens_matryoshka.saes.nested_training_config import NestedTrainingSAEConfig
from sae_lens_matryoshka.saes.plugin_sae import PluginSAE
from sae_lens_matryoshka.saes.standardized_channels import TakesStandardizedChannels, channels_that_vary
from sae_lens_matryoshka.saes.training_statistics import KeepsTrainingStatistics
from sae_lens_matryoshka.saes.training_step import Encoding, Prefixes, TrainingPath


class NestedTrainingSAE(KeepsTrainingStatistics, TakesStandardizedChannels, PluginSAE, TrainingSAE[Any]):
    """A Matryoshka SAE in training, whatever makes its latents sparse.

    Subclasses also inherit from the SAELens class of their one-level twin, after this one.

    ``W_enc`` is kept in memory column by column from the start, which makes gathering columns and writing their
    gradient fast. Its shape and saved form are SAELens's.
    """

    cfg: NestedTrainingSAEConfig  # type: ignore[assignment]
    b_enc: nn.Parameter
    latent_contribution: Float[Tensor, " d_sae"]

    def __init__(self, cfg: Any, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        self.W_enc.data = _by_column(self.W_enc.data)
        if cfg.order_latents_by_contribution:
            self._register_statistic("latent_contribution", torch.zeros(cfg.d_sae, dtype=torch.float32))

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
        ``inner_mse_loss_<width>`` for the others, or ``prefix_mse_loss``, the mean over a step's drawn prefixes), so
        that runs with different objectives compare; ``loss`` is the objective plus the penalties. On the fast path only
        ``loss`` carries a gradient, and ``feature_acts`` and ``hidden_pre`` may be sparse and hold active latents only.

        Args:
            step_input: What SAELens's trainer hands over; ``sae_in`` has shape (batch, d_in).

        Raises:
            ValueError: If the input or the loss is not finite, or is not standardized and should be. Parameters and
                running statistics are untouched then.
        """
        self.check_is_standardized()
        sae_in, compiling = step_input.sae_in, torch.compiler.is_compiling()
        if not compiling and not sae_in.isfinite().all():
            raise ValueError(
                f"Training step {step_input.n_training_steps}: the input activations hold "
                f"{int((~sae_in.isfinite()).sum())} values that are not finite, of {sae_in.numel()}."
            )
        fast = self.training_path.fast and sae_in.ndim == 2 and not sae_in.requires_grad
        output, level_residuals = (self._fast_step if fast else self._reference_step)(step_input)
        if not compiling and not output.loss.isfinite():
            raise ValueError(
                f"Training step {step_input.n_training_steps}: the loss is {output.loss.item()}; the input's largest "
                f"absolute value is {sae_in.abs().max().item():.4g}, its mean norm {sae_in.norm(dim=-1).mean():.4g}."
            )
        if step_input.is_logging_step:
            output.metrics.update(self._level_metrics(step_input, output, level_residuals))
        self._after_step(output)
        return output

    def prefixes(self, n_training_steps: int) -> Prefixes:
        """The prefixes that a step trains: the levels, or with ``prefix_sampling`` those drawn for this step."""
        law = self.cfg.prefix_law
        widths = self.cfg.matryoshka_widths if law is None else law.draw(self.cfg.d_sae, n_training_steps)
        return Prefixes(widths, self.latent_order)

    @property
    def latent_order(self) -> Int[Tensor, " d_sae"] | None:
        """The latent at each place of the dictionary, by contribution; None where latents are not ordered.

        Parameters, optimizer state and the trainer's statistics stay where they are, and only places move: the same
        mathematics as moving all of them together, under any trainer. Saving puts the latents in their places.
        """
        if not self.cfg.order_latents_by_contribution:
            return None
        return self.latent_contribution.argsort(descending=True, stable=True)

    @abstractmethod
    def _encode(self, x: Float[Tensor, "batch d_in"], prefixes: Prefixes) -> Encoding:
        """Which latents are active on the processed input, and what their decoder rows are multiplied by."""

    @abstractmethod
    def _penalties(
        self,
        step_input: TrainStepInput,
        encoding: Encoding,
        errors: NestedErrors,
        row_scale: Float[Tensor, "batch 1"] | None,
    ) -> dict[str, Tensor]:
        """What the loss holds beside the reconstruction errors, by SAELens's names."""

    def _decoder_scale(self) -> Float[Tensor, " d_sae"] | None:
        """What SAELens's activations of each latent are multiplied by to get coefficients; None for 1."""
        return None

    def _subtracted_b_dec(self) -> Float[Tensor, " d_in"] | None:
        """The decoder bias if it is subtracted from the input."""
        return self.b_dec if self.cfg.apply_b_dec_to_input else None

    @property
    def _needs_level_residuals(self) -> bool:
        """Whether the penalties read the residual of every prefix."""
        return False

    def _fast_step(self, step_input: TrainStepInput) -> tuple[TrainStepOutput, Tensor | None]:
        """The step by ``ops/``, and the residual of every prefix where they are at hand or to be logged."""
        x = self.process_sae_in(step_input.sae_in)
        encoding = self._encode(x, self.prefixes(step_input.n_training_steps))
        latents, hidden_pre = encoding.latents, encoding.hidden_pre.detach()
        target, row_scale = self._target_before_normalization_is_undone(step_input.sae_in)
        errors = nested_errors(
            encoding.coefficients,
            self.W_dec,
            self.b_dec,
            target,
            latents,
            self.cfg.objective,
            row_scale,
            self._needs_level_residuals or step_input.is_logging_step,
        )
        penalties = self._penalties(step_input, encoding, errors, row_scale)
        error, level_residuals = errors.residual, errors.level_residuals
        if row_scale is not None:
            error = error * row_scale
            level_residuals = None if level_residuals is None else level_residuals * row_scale
        output = TrainStepOutput(
            sae_in=step_input.sae_in,
            sae_out=step_input.sae_in + error,
            feature_acts=encoding.feature_acts,
            hidden_pre=latents.to_sparse(hidden_pre) if isinstance(latents, ActiveLatents) else hidden_pre,
            loss=torch.stack([errors.loss, *penalties.values()]).sum() if penalties else errors.loss,
            losses={
                "mse_loss": errors.squared_errors[-1],
                **penalties,
                **self._inner_losses(list(errors.squared_errors[:-1])),
            },
        )
        return output, level_residuals

    def _reference_step(self, step_input: TrainStepInput) -> tuple[TrainStepOutput, Tensor | None]:
        """The step by definition: the one-level twin's, then a decoder product a prefix; residuals to be logged."""
        output = TrainingSAE.training_forward_pass(self, step_input)
        prefixes = self.prefixes(step_input.n_training_steps)
        reconstructions = self._reconstructions(output.feature_acts, prefixes, self.cfg.stop_gradient_between_levels)
        if not self.cfg.stop_gradient_between_levels:
            reconstructions[-1] = output.sae_out  # which hooks may have changed
        objective = self.cfg.objective
        squared_errors = [
            self.mse_loss_fn(reconstruction, step_input.sae_in).sum(dim=-1).mean() for reconstruction in reconstructions
        ]
        errors = squared_errors
        if objective.snap_loss:
            norms = [torch.linalg.vector_norm(r - step_input.sae_in, dim=-1).mean() for r in reconstructions[:-1]]
            errors = [*norms, squared_errors[-1]]
        penalties = [loss for name, loss in output.losses.items() if name != "mse_loss"]
        weights = objective.weights(len(errors))
        output.loss = sum([w * error for w, error in zip(weights, errors, strict=True)], sum(penalties))  # type: ignore[assignment]
        output.losses.update(self._inner_losses(squared_errors[:-1]))
        logged = torch.stack(reconstructions).detach() - step_input.sae_in if step_input.is_logging_step else None
        return output, logged

    def _reconstructions(
        self, feature_acts: Float[Tensor, "batch d_sae"], prefixes: Prefixes, stop_gradient: bool = False
    ) -> list[Float[Tensor, "batch d_in"]]:
        """Every prefix's reconstruction by definition, from SAELens's activations."""
        scale = self._decoder_scale()
        dense = feature_acts.to_dense() if feature_acts.is_sparse else feature_acts
        coefficients = prefixes.by_place(dense if scale is None else dense * scale)
        W_dec = self.W_dec if prefixes.order is None else self.W_dec[prefixes.order]
        decoded, narrower = self.b_dec, 0
        reconstructions: list[Tensor] = []
        for width in prefixes.widths:
            if stop_gradient and narrower > 0:
                decoded = decoded.detach()
            decoded = decoded + coefficients[..., narrower:width] @ W_dec[narrower:width]
            reconstructions.append(self.run_time_activation_norm_fn_out(decoded))
            narrower = width
        return reconstructions

    def _inner_losses(self, squared_errors: list[Tensor]) -> dict[str, Tensor]:
        """The errors of all prefixes but the full one, by name."""
        if self.cfg.prefix_sampling is not None:
            return {"prefix_mse_loss": torch.stack(squared_errors).mean()}
        widths = self.cfg.matryoshka_widths[:-1]
        return {f"inner_mse_loss_{width}": error for width, error in zip(widths, squared_errors, strict=True)}

    @torch.no_grad()
    def _after_step(self, output: TrainStepOutput) -> None:
        """Move the running statistics."""
        if self.cfg.order_latents_by_contribution:
            # values of sparse tensors: squaring keeps the layout
            contribution = output.feature_acts.detach().float().pow(2).sum(0).to_dense() / output.sae_in.shape[0]
            if self._decoder_scale() is None:
                contribution = contribution * self.W_dec.float().norm(dim=-1).pow(2)
            self.latent_contribution.lerp_(contribution.float(), self.cfg.latent_contribution_lr)

    @torch.no_grad()
    def _level_metrics(
        self,
        step_input: TrainStepInput,
        output: TrainStepOutput,
        residuals: Float[Tensor, "n_prefixes batch d_in"] | None,
    ) -> dict[str, Tensor]:
        """Variance unexplained (also of standardized channels), L0 and dead latents of each level, on this batch."""
        sae_in = step_input.sae_in.to(torch.promote_types(step_input.sae_in.dtype, torch.float32))
        levels = Prefixes(self.cfg.matryoshka_widths, self.latent_order)
        if residuals is None or self.cfg.prefix_sampling is not None:
            self.process_sae_in(step_input.sae_in)  # the reference step has used up the statistics of the input
            residuals = torch.stack(self._reconstructions(output.feature_acts, levels)) - sae_in
        unexplained = residuals.to(sae_in.dtype).pow(2).mean(1)
        variance = sae_in.var(0, unbiased=False)
        varying = channels_that_vary(sae_in.mean(0), variance.sqrt())
        n_firings = levels.by_place(output.feature_acts.bool().float().sum(0).to_dense())
        dead = None if step_input.dead_neuron_mask is None else levels.by_place(step_input.dead_neuron_mask)
        metrics: dict[str, Tensor] = {}
        for width, of_channels in zip(levels.widths, unexplained, strict=True):
            metrics[f"fvu_level_{width}"] = of_channels.sum() / variance.sum()
            metrics[f"fvu_standardized_level_{width}"] = (of_channels / variance)[varying].mean()
            metrics[f"l0_level_{width}"] = n_firings[:width].sum() / sae_in.shape[0]
            if dead is not None:
                metrics[f"dead_level_{width}"] = dead[:width].sum()
        return metrics

    @override
    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving(state_dict)
        state_dict["W_enc"] = state_dict["W_enc"].contiguous()
        state_dict.update(self.statistics)

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving_inference(state_dict)
        order = self.latent_order
        for name in self.statistics:
            del state_dict[name]
        if "threshold" in state_dict:  # which SAELens trains in float32 whatever the dtype
            state_dict["threshold"] = state_dict["threshold"].to(self.dtype)
        if order is not None:
            for name in ("b_enc", "W_dec", "threshold"):
                if name in state_dict:
                    state_dict[name] = state_dict[name][order]
            state_dict["W_enc"] = state_dict["W_enc"][:, order]
        state_dict["W_enc"] = state_dict["W_enc"].contiguous()

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_loading(state_dict)
        state_dict["W_enc"] = _by_column(state_dict["W_enc"])

    @override
    def _setup_activation_normalization(self) -> None:
        """Undo a sample's normalization as often as there are levels.

        SAELens deletes the statistics as it undoes the normalization for the first time, so that its Matryoshka class
        fails on its first step with ``layer_norm`` and ``constant_norm_rescale``.
        """
        super()._setup_activation_normalization()
        undo_once = self.run_time_activation_norm_fn_out

        def undo(x: Tensor) -> Tensor:
            statistics = {name: getattr(self, name) for name in _SAMPLE_STATISTICS if hasattr(self, name)}
            undone = undo_once(x)
            for name, value in statistics.items():
                setattr(self, name, value)
            return undone

        if self.cfg.normalize_activations in SAMPLE_NORMALIZATIONS:
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
            centred = sae_in - sae_in.mean(dim=-1, keepdim=True)
            row_scale = centred.std(dim=-1, keepdim=True)
            return torch.where(row_scale > 0, centred / row_scale, 0.0), row_scale
        if self.cfg.normalize_activations == "constant_norm_rescale":
            row_scale = sae_in.norm(dim=-1, keepdim=True) / sae_in.shape[-1] ** 0.5
            return sae_in / row_scale, row_scale
        return sae_in, None


SAMPLE_NORMALIZATIONS = ("layer_norm", "constant_norm_rescale")
"""Normalizations by statistics of each sample, which SAELens undoes after decoding."""

_SAMPLE_STATISTICS = ("ln_mu", "ln_std", "x_norm_coeff")


def level_dead(dead_mask: Bool[Tensor, " d_sae"], prefixes: Prefixes) -> list[Int[Tensor, " n_dead"]]:
    """The dead latents among each prefix's own."""
    places = prefixes.by_place(dead_mask).nonzero().squeeze(1)
    bounds = zip([0, *prefixes.widths[:-1]], prefixes.widths, strict=True)
    return [prefixes.latent_ids(places[(places >= start) & (places < stop)]) for start, stop in bounds]


def _by_column(W_enc: Float[Tensor, "d_in d_sae"]) -> Float[Tensor, "d_in d_sae"]:
    return W_enc.t().contiguous().t()
