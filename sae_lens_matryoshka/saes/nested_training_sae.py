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

import itertools
from abc import abstractmethod
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from sae_lens import TrainingSAE
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput, mse_loss
from torch import Tensor, nn
from typing_extensions import override

from sae_lens_matryoshka.ops.latents import ActiveLatents
from sae_lens_matryoshka.ops.nested_loss import NestedErrors, nested_errors, sample_weights
from sae_lens_matryoshka.saes.aligned_encoder import align_encoder
from sae_lens_matryoshka.saes.nested_training_config import ORDER_LRS, NestedTrainingSAEConfig
from sae_lens_matryoshka.saes.normalized_samples import NormalizesSamples
from sae_lens_matryoshka.saes.plugin_sae import PluginSAE
from sae_lens_matryoshka.saes.standardized_channels import TakesStandardizedChannels, channels_that_vary
from sae_lens_matryoshka.saes.training_statistics import KeepsTrainingStatistics
from sae_lens_matryoshka.saes.training_step import Encoding, Prefixes, TrainingPath


class NestedTrainingSAE(
    KeepsTrainingStatistics, TakesStandardizedChannels, NormalizesSamples, PluginSAE, TrainingSAE[Any]
):
    """A Matryoshka SAE in training, whatever makes its latents sparse.

    Subclasses also inherit from the SAELens class of their one-level twin, after this one.

    ``W_enc`` is kept in memory column by column from the start, which makes gathering columns and writing their
    gradient fast. Its shape and saved form are SAELens's.
    """

    cfg: NestedTrainingSAEConfig  # type: ignore[assignment]
    b_enc: nn.Parameter
    latent_order_statistic: Float[Tensor, " d_sae"]

    def __init__(self, cfg: Any, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        self.W_enc.data = _by_column(self.W_enc.data)
        if cfg.order_latents_by is not None:
            self._register_statistic("latent_order_statistic", torch.zeros(cfg.d_sae, dtype=torch.float32))

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
        if self.cfg.aligned_encoder:
            align_encoder(self.W_enc.data, self.W_dec.data)
        sae_in, compiling = step_input.sae_in, torch.compiler.is_compiling()
        fast = self.training_path.fast and sae_in.ndim == 2 and not sae_in.requires_grad
        output, level_residuals = (self._fast_step if fast else self._reference_step)(step_input)
        if not compiling and not output.loss.isfinite():  # as it never is if the input is not
            n_bad = int((~sae_in.isfinite()).sum())
            problem = (
                f"the input activations hold {n_bad} values that are not finite, of {sae_in.numel()}."
                if n_bad
                else f"the loss is {output.loss.item()}; the input's largest absolute value is "
                f"{sae_in.abs().max().item():.4g}, its mean norm {sae_in.norm(dim=-1).mean():.4g}."
            )
            raise ValueError(f"Training step {step_input.n_training_steps}: {problem}")
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
        """The latent at each place of the dictionary; None where latents are not ordered.

        Parameters, optimizer state and the trainer's statistics stay where they are, and only places move: the same
        mathematics as moving all of them together, under any trainer. Saving puts the latents in their places.
        """
        if self.cfg.order_latents_by is None:
            return None
        return self.latent_order_statistic.argsort(descending=True, stable=True)

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
        stop_gradient = bool(self.cfg.stop_gradient_between_levels)
        reconstructions = self._reconstructions(output.feature_acts, prefixes, stop_gradient)
        if self.cfg.stop_gradient_between_levels is not True:
            reconstructions[-1] = output.sae_out  # which hooks may have changed, and all latents reconstruct
        objective = self.cfg.objective
        squares = [self.mse_loss_fn(r, step_input.sae_in).sum(dim=-1) for r in reconstructions]
        terms = squares
        if objective.snap_loss:
            norms = [torch.linalg.vector_norm(r - step_input.sae_in, dim=-1) for r in reconstructions[:-1]]
            terms = [*norms, squares[-1]]
        errors = [(sample_weights(s, objective.tilt) * term).sum() for s, term in zip(squares, terms, strict=True)]
        penalties = [loss for name, loss in output.losses.items() if name != "mse_loss"]
        output.loss = torch.stack([objective.of_levels(torch.stack(errors)), *penalties]).sum()
        output.losses.update(self._inner_losses([of_level.mean() for of_level in squares[:-1]]))
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
        order_by = self.cfg.order_latents_by
        if order_by is None:
            return
        acts = output.feature_acts.detach()
        if order_by == "firing_frequency":
            of_step = acts.bool().float().sum(0).to_dense() / output.sae_in.shape[0]
        else:
            # values of sparse tensors: squaring keeps the layout
            of_step = acts.float().pow(2).sum(0).to_dense() / output.sae_in.shape[0]
            if self._decoder_scale() is None:
                of_step = of_step * self.W_dec.float().norm(dim=-1).pow(2)
        lr = ORDER_LRS[order_by] if self.cfg.latent_order_lr is None else self.cfg.latent_order_lr
        self.latent_order_statistic.lerp_(of_step.float(), lr)

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
        if self.cfg.aligned_encoder:  # which the last step has moved
            state_dict["W_enc"] = state_dict["W_enc"].clone()
            align_encoder(state_dict["W_enc"], state_dict["W_dec"])
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


def level_dead(dead_mask: Bool[Tensor, " d_sae"], prefixes: Prefixes) -> list[Int[Tensor, " n_dead"]]:
    """The dead latents among each prefix's own."""
    in_places = prefixes.by_place(dead_mask)
    places = in_places.nonzero().squeeze(1)
    n_dead = torch.stack([in_places[:width].sum() for width in prefixes.widths]).tolist()
    return [prefixes.latent_ids(places[start:stop]) for start, stop in itertools.pairwise([0, *n_dead])]


def _by_column(W_enc: Float[Tensor, "d_in d_sae"]) -> Float[Tensor, "d_in d_sae"]:
    return W_enc.t().contiguous().t()
