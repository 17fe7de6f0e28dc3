"""Where the non-zeros of a batch of latent activations are, and the three products with the decoder that need it.

Two layouts of the same interface. :class:`ActiveLatents` lists the non-zeros in the two orders that sparse products
need, by level and sample, and by latent. :class:`DenseLatents` is for activations of which too many are non-zero for
that to pay: the whole matrix, cut into levels.
"""

import itertools
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_matryoshka.ops.selection import Selection
from sae_lens_matryoshka.ops.sparse import group_starts, sampled_products, weighted_row_sums


@dataclass(frozen=True)
class ActiveLatents:
    """The non-zeros of a batch of latent activations, grouped by level, within a level by sample.

    Level l's latents of sample b are the entries ``starts[l * batch + b]`` up to ``starts[l * batch + b + 1]``: the
    compressed rows of a matrix of shape (n_levels * batch, d_sae).
    """

    rows: Int[Tensor, " n"]
    """The sample of each entry."""

    columns: Int[Tensor, " n"]
    """The latent of each entry."""

    level_rows: Int[Tensor, " n"]
    """``level * batch + sample`` of each entry, ascending."""

    starts: Int[Tensor, " n_levels_times_batch_plus_1"]
    """Where the entries of each level and sample start."""

    by_column: Int[Tensor, " n"]
    """The order that sorts the entries by latent."""

    column_starts: Int[Tensor, " d_sae_plus_1"]
    """Where each latent's entries start in that order."""

    hidden_pre: Float[Tensor, " n"]
    scores: Float[Tensor, " n"]
    """The scores that were compared in the selection."""

    batch: int
    widths: tuple[int, ...]

    def to_sparse(self, values: Float[Tensor, " n"]) -> Float[Tensor, "batch d_sae"]:
        """One value for each entry, in their order, as a coalesced sparse COO tensor."""
        d_sae = self.widths[-1]
        flat, order = (self.rows * d_sae + self.columns).sort()
        indices = torch.stack([flat // d_sae, flat % d_sae])
        return torch.sparse_coo_tensor(
            indices, values[order], (self.batch, d_sae), is_coalesced=True, check_invariants=False
        )

    def row_sums(self, values: Float[Tensor, " n"]) -> Float[Tensor, " batch"]:
        """The sum of each sample's values, one for each entry."""
        return values.new_zeros(self.batch).index_add(0, self.rows, values)

    def level_sums(
        self, coefficients: Float[Tensor, " n"], W_dec: Float[Tensor, "d_sae d_in"]
    ) -> Float[Tensor, "n_levels batch d_in"]:
        """What each level's own latents add to the reconstruction."""
        sums = weighted_row_sums(W_dec, self.columns, coefficients, self.starts)
        return sums.view(len(self.widths), self.batch, W_dec.shape[1])

    def coefficients_grad(
        self, level_grads: Float[Tensor, "n_levels batch d_in"], W_dec: Float[Tensor, "d_sae d_in"]
    ) -> Float[Tensor, " n"]:
        """The gradient of the coefficients from that of :meth:`level_sums`."""
        return sampled_products(level_grads.view(-1, W_dec.shape[1]), W_dec, self.columns, self.starts)

    def W_dec_grad(
        self, level_grads: Float[Tensor, "n_levels batch d_in"], coefficients: Float[Tensor, " n"]
    ) -> Float[Tensor, "d_sae d_in"]:
        """The gradient of the decoder from that of :meth:`level_sums`."""
        order, rows = self.by_column, level_grads.view(-1, level_grads.shape[-1])
        return weighted_row_sums(rows, self.level_rows[order], coefficients[order], self.column_starts)


@dataclass(frozen=True)
class DenseLatents:
    """The whole matrix of latent activations, cut into levels: L matrix products in place of one, of the same cost."""

    batch: int
    widths: tuple[int, ...]

    level_columns: "tuple[slice | Int[Tensor, ' n'], ...]"
    """Each level's own latents."""

    def level_sums(
        self, coefficients: Float[Tensor, "batch d_sae"], W_dec: Float[Tensor, "d_sae d_in"]
    ) -> Float[Tensor, "n_levels batch d_in"]:
        """What each level's own latents add to the reconstruction."""
        sums = W_dec.new_empty(len(self.widths), self.batch, W_dec.shape[1])
        for level, columns in enumerate(self.level_columns):
            sums[level] = coefficients[:, columns] @ W_dec[columns]
        return sums

    def coefficients_grad(
        self, level_grads: Float[Tensor, "n_levels batch d_in"], W_dec: Float[Tensor, "d_sae d_in"]
    ) -> Float[Tensor, "batch d_sae"]:
        """The gradient of the coefficients from that of :meth:`level_sums`."""
        grad = W_dec.new_empty(self.batch, W_dec.shape[0])
        for level_grad, columns in zip(level_grads, self.level_columns, strict=True):
            grad[:, columns] = (level_grad @ W_dec[columns].t()).to(grad.dtype)
        return grad

    def W_dec_grad(
        self, level_grads: Float[Tensor, "n_levels batch d_in"], coefficients: Float[Tensor, "batch d_sae"]
    ) -> Float[Tensor, "d_sae d_in"]:
        """The gradient of the decoder from that of :meth:`level_sums`."""
        grad = level_grads.new_empty(self.widths[-1], level_grads.shape[-1])
        for level_grad, columns in zip(level_grads, self.level_columns, strict=True):
            grad[columns] = (coefficients[:, columns].t() @ level_grad.to(coefficients.dtype)).to(grad.dtype)
        return grad


def lay_out(
    selection: Selection, batch: int, widths: list[int], positions: Int[Tensor, " d_sae"] | None = None
) -> ActiveLatents:
    """Sort a selection into the two orders.

    Args:
        selection: The entries, in any order.
        batch: Number of samples.
        widths: The level widths, smallest first.
        positions: The place of each latent in the dictionary, which decides its level; None for its index.
    """
    d_sae = widths[-1]
    places = selection.columns if positions is None else positions[selection.columns]
    level = torch.zeros_like(places)
    for width in widths[:-1]:
        level += places >= width
    level_rows = level * batch + selection.rows
    keys, order = (level_rows * d_sae + selection.columns).sort()
    level_rows, columns = keys // d_sae, keys % d_sae
    by_column = columns.argsort(stable=True)
    return ActiveLatents(
        rows=level_rows % batch,
        columns=columns,
        level_rows=level_rows,
        starts=group_starts(level_rows, len(widths) * batch),
        by_column=by_column,
        column_starts=group_starts(columns[by_column], d_sae),
        hidden_pre=selection.hidden_pre[order],
        scores=selection.scores[order],
        batch=batch,
        widths=tuple(widths),
    )


def lay_out_dense(batch: int, widths: list[int], order: Int[Tensor, " d_sae"] | None = None) -> DenseLatents:
    """Cut the whole matrix into levels; ``order`` is the latent at each place, None if latents are in their places."""
    own = [slice(start, stop) for start, stop in itertools.pairwise([0, *widths])]
    return DenseLatents(batch, tuple(widths), tuple(own if order is None else (order[places] for places in own)))
