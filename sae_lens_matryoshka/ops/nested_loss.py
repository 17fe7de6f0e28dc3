"""The nested reconstruction losses of a Matryoshka SAE and their exact gradient, in one pass over the activations.

With residuals r_l = b_dec + sum_{i < w_l} a_i W_i - x of level l, the loss is sum_l c_l mean_b |r_l|^2. Level l adds
its own latents to level l - 1, so running sums give all residuals. A latent i of level l(i) enters the residuals of
that level and all larger ones, so with g_l = (2 / batch) c_l r_l and the suffix sums R_l = sum_{m >= l} g_m

    dL/da_bi = <W_i, R_l(i)[b]>      dL/dW_i = sum_b a_bi R_l(i)[b]      dL/db_dec = sum_b R_1[b]

Any number of levels costs the three passes over the activations that one costs (loss: arXiv:2503.17547, section 3).
The variants of the loss (:class:`NestedObjective`) change g_l or leave out the suffix sums, nothing else.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_matryoshka.ops.latents import ActiveLatents, DenseLatents

BLOCK_ELEMENTS = 2**17
"""Elements of a level that are worked on at once on CPU: 512 KB in float32."""


@dataclass(frozen=True)
class NestedObjective:
    """Which loss is made of the levels' residuals; the default is the paper's."""

    level_weights: tuple[float, ...] | None = None
    """The weight of each level's error in the loss, c_l; None for 1."""

    snap_loss: bool = False
    """The inner levels count by the L2 norm of their residual, |r_l|, in place of its square: g_l becomes
    c_l r_l / (batch |r_l|), a pull that does not fade as the residual shrinks. The full level stays squared."""

    stop_gradient: bool | Literal["inner"] = False
    """Each level trains only its own new latents, against what the smaller levels leave over: R_l becomes g_l. In the
    decoder the bias belongs to the smallest level. With ``"inner"`` the full level trains all latents nevertheless:
    R_l becomes g_l + g_L for the inner levels, and g_L for the full one."""

    tilt: float = 0.0
    """How much more samples count that a level reconstructs badly: its error is no mean over samples, but weighted by
    softmax(tilt e_b / mean(e)) over the batch, e_b a sample's squared error, with weights that are held fixed (tilted
    empirical risk minimization, arXiv:2007.01162, section 2: the gradient of its loss). 0 is the mean."""

    def of_levels(self, errors: Float[Tensor, " n_levels"]) -> Float[Tensor, ""]:
        """The loss that the levels' errors make."""
        # numbers of Python, since a tensor of them would make the GPU wait for its copy
        weighted = (
            errors if self.level_weights is None else [w * e for w, e in zip(self.level_weights, errors, strict=True)]
        )
        return torch.stack(list(weighted)).sum()


class NestedErrors(NamedTuple):
    """What the levels of a dictionary leave unexplained of a batch."""

    loss: Float[Tensor, ""]
    """The levels' errors, weighted and summed. Alone carries the gradient."""

    squared_errors: Float[Tensor, " n_levels"]
    """Each level's squared error, summed over dimensions and averaged over samples."""

    residual: Float[Tensor, "batch d_in"]
    """The full level's reconstruction minus the target."""

    level_residuals: Float[Tensor, "n_levels batch d_in"] | None
    """The same for every level, if asked for."""


def nested_errors_reference(
    coefficients: Float[Tensor, "batch d_sae"],
    W_dec: Float[Tensor, "d_sae d_in"],
    b_dec: Float[Tensor, " d_in"],
    target: Float[Tensor, "batch d_in"],
    widths: list[int],
    objective: NestedObjective = NestedObjective(),
    row_scale: Float[Tensor, "batch 1"] | None = None,
) -> NestedErrors:
    """The errors of all levels by their definition, a dense product a level.

    Args:
        coefficients: What each latent's decoder row is multiplied by, for each sample.
        W_dec: Decoder weights.
        b_dec: Decoder bias.
        target: What to reconstruct.
        widths: The level widths, smallest first.
        objective: Which loss to make of the residuals.
        row_scale: What the residuals of each sample are multiplied by first; None for 1.
    """
    reconstruction = b_dec.expand_as(target)
    residuals: list[Tensor] = []
    for narrower, width in itertools.pairwise([0, *widths]):
        if objective.stop_gradient and narrower > 0:
            reconstruction = reconstruction.detach()
        reconstruction = reconstruction + coefficients[:, narrower:width] @ W_dec[narrower:width]
        residuals.append(reconstruction - target)
    if objective.stop_gradient == "inner":
        residuals[-1] = b_dec + coefficients @ W_dec - target
    scaled = torch.stack(residuals) if row_scale is None else torch.stack(residuals) * row_scale
    squares = scaled.pow(2).sum(-1)
    terms = squares
    if objective.snap_loss:
        terms = torch.cat([torch.linalg.vector_norm(scaled[:-1], dim=-1), squares[-1:]])
    errors = (sample_weights(squares, objective.tilt) * terms).sum(-1)
    loss = objective.of_levels(errors)
    squared_errors = squares.detach().mean(-1)
    return NestedErrors(loss, squared_errors, residuals[-1].detach(), torch.stack(residuals).detach())


def sample_weights(squared_errors: Float[Tensor, "*levels batch"], tilt: float) -> Float[Tensor, "*levels batch"]:
    """What each sample counts in a level's error: softmax(tilt e_b / mean(e)), without gradient.

    Args:
        squared_errors: e_b, the squared error of each sample.
        tilt: How much more badly reconstructed samples count; 0 weighs all alike.
    """
    errors = squared_errors.detach()
    mean = errors.mean(-1, keepdim=True)
    # a level without any error has no sample that is worse than another
    return torch.softmax(torch.where(mean > 0, tilt * errors / mean, 0.0), dim=-1)


def nested_errors(
    coefficients: "Float[Tensor, ' n'] | Float[Tensor, 'batch d_sae']",
    W_dec: Float[Tensor, "d_sae d_in"],
    b_dec: Float[Tensor, " d_in"],
    target: Float[Tensor, "batch d_in"],
    latents: ActiveLatents | DenseLatents,
    objective: NestedObjective = NestedObjective(),
    row_scale: Float[Tensor, "batch 1"] | None = None,
    keep_level_residuals: bool = False,
) -> NestedErrors:
    """The same as :func:`nested_errors_reference`, all levels for the price of one; ``target`` gets no gradient.

    ``coefficients`` are a value for each entry of :class:`ActiveLatents`, or the whole matrix for
    :class:`DenseLatents`. ``keep_level_residuals`` returns every level's residual, which costs an array of that size.
    """
    outputs = _NestedErrors.apply(
        coefficients, W_dec, b_dec, target, latents, objective, row_scale, keep_level_residuals
    )
    return NestedErrors(*outputs)  # type: ignore[misc]


def _blocks(batch: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, batch, size))


def _residuals_to_gradients(
    residuals: list[Float[Tensor, "rows d_in"]],
    norms: Float[Tensor, "n_levels rows"],
    sample_weights: Float[Tensor, "n_levels rows"],
    objective: NestedObjective,
) -> None:
    """Turn the residuals r_l of some samples into R_l, in place, the largest level first."""
    last = len(residuals) - 1
    factors = 2 * sample_weights
    for factor, weight in zip(factors, objective.level_weights or (), strict=False):
        factor *= weight
    if objective.snap_loss:
        # a residual of exactly 0 has the subgradient 0, as in torch
        factors[:-1] *= torch.where(norms[:-1] > 0, 1 / (2 * norms[:-1]), 0.0)
    for index in reversed(range(last + 1)):
        block, factor = residuals[index], factors[index].unsqueeze(-1)
        if index == last or objective.stop_gradient is True:
            block *= factor
        else:
            larger = residuals[last if objective.stop_gradient == "inner" else index + 1]
            torch.addcmul(larger, block, factor, out=block)


class _NestedErrors(torch.autograd.Function):
    """Turns the residuals into R_l while they are at hand, so that a single array serves both passes."""

    @staticmethod
    def forward(
        ctx: Any,
        coefficients: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        target: Tensor,
        latents: ActiveLatents | DenseLatents,
        objective: NestedObjective,
        row_scale: Tensor | None,
        keep_level_residuals: bool,
    ) -> tuple[Tensor | None, ...]:
        n_levels, d_in = len(latents.widths), W_dec.shape[1]
        levels = latents.level_sums(coefficients, W_dec)
        levels[0] += b_dec - target
        residual = torch.empty_like(target)
        level_residuals = torch.empty_like(levels) if keep_level_residuals else None
        norms = levels.new_empty(n_levels, latents.batch)
        # blocks of samples small enough that one level is still in the cache when the next one is added to it
        size = max(1, BLOCK_ELEMENTS // d_in if target.device.type == "cpu" else latents.batch)
        tilted = objective.tilt != 0
        uniform = None if tilted else levels.new_full((n_levels, latents.batch), 1 / latents.batch)
        for rows in _blocks(latents.batch, size):
            blocks = [level[rows] for level in levels]
            for narrower, block in itertools.pairwise(blocks):
                block += narrower
            residual[rows] = blocks[-1]
            if level_residuals is not None:
                level_residuals[:, rows] = levels[:, rows]
            for index, block in enumerate(blocks):
                scaled = block if row_scale is None else block * row_scale[rows]
                torch.linalg.vector_norm(scaled, dim=-1, out=norms[index, rows])
            if uniform is not None:
                _residuals_to_gradients(blocks, norms[:, rows], uniform[:, rows], objective)
        squares = norms.pow(2)
        of_samples = uniform
        if of_samples is None:  # what a sample counts depends on all of them
            of_samples = sample_weights(squares, objective.tilt)
            for rows in _blocks(latents.batch, size):
                blocks = [level[rows] for level in levels]
                _residuals_to_gradients(blocks, norms[:, rows], of_samples[:, rows], objective)
        if row_scale is not None:
            levels *= row_scale.pow(2)
        terms = torch.cat([norms[:-1], squares[-1:]]) if objective.snap_loss else squares
        loss = objective.of_levels((of_samples * terms).sum(-1))
        squared_errors = squares.mean(-1)
        ctx.save_for_backward(coefficients, W_dec, levels)
        ctx.latents = latents
        device_type = target.device.type
        ctx.autocast = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
        ctx.mark_non_differentiable(squared_errors, residual, *([] if level_residuals is None else [level_residuals]))
        return loss, squared_errors, residual, level_residuals

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        coefficients, W_dec, level_grads = ctx.saved_tensors
        latents: ActiveLatents | DenseLatents = ctx.latents
        loss_grad = grads[0]
        # torch runs backward passes outside autocast; dense products are to be as fast here as they are forward
        with torch.autocast(W_dec.device.type, ctx.autocast, enabled=ctx.autocast is not None):
            coefficients_grad = latents.coefficients_grad(level_grads, W_dec) * loss_grad
            if isinstance(latents, ActiveLatents):  # fewer coefficients than numbers in W_dec
                W_dec_grad = latents.W_dec_grad(level_grads, coefficients * loss_grad)
            else:
                W_dec_grad = latents.W_dec_grad(level_grads, coefficients).mul_(loss_grad)
        return coefficients_grad, W_dec_grad, level_grads[0].sum(0) * loss_grad, *[None] * 5
