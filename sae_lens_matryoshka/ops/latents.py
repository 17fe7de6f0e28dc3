"""The active latents of a batch in the two orders that sparse products need: by level and sample, and by latent."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_matryoshka.levels import level_of
from sae_lens_matryoshka.ops.selection import Selection


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
    """The pre-activations."""

    scores: Float[Tensor, " n"]
    """The scores that were compared in the selection."""

    batch: int
    """Number of samples."""

    widths: tuple[int, ...]
    """The level widths."""

    def to_sparse(self, values: Float[Tensor, " n"]) -> Float[Tensor, "batch d_sae"]:
        """One value for each entry as a coalesced sparse COO tensor.

        Args:
            values: The values, in the order of the entries.
        """
        d_sae = self.widths[-1]
        flat, order = (self.rows * d_sae + self.columns).sort()
        indices = torch.stack([flat // d_sae, flat % d_sae])
        return torch.sparse_coo_tensor(
            indices, values[order], (self.batch, d_sae), is_coalesced=True, check_invariants=False
        )


def lay_out(selection: Selection, batch: int, widths: list[int]) -> ActiveLatents:
    """Sort a selection into the two orders.

    Args:
        selection: The entries, in any order.
        batch: Number of samples.
        widths: The level widths, smallest first.
    """
    d_sae = widths[-1]
    level_rows = level_of(selection.columns, widths) * batch + selection.rows
    keys, order = (level_rows * d_sae + selection.columns).sort()
    level_rows, columns = keys // d_sae, keys % d_sae
    by_column = columns.argsort(stable=True)
    return ActiveLatents(
        rows=level_rows % batch,
        columns=columns,
        level_rows=level_rows,
        starts=_starts(level_rows, len(widths) * batch),
        by_column=by_column,
        column_starts=_starts(columns, d_sae),
        hidden_pre=selection.hidden_pre[order],
        scores=selection.scores[order],
        batch=batch,
        widths=tuple(widths),
    )


def _starts(groups: Int[Tensor, " n"], n_groups: int) -> Int[Tensor, " n_groups_plus_1"]:
    starts = groups.new_zeros(n_groups + 1)
    starts[1:] = torch.bincount(groups, minlength=n_groups).cumsum(0)
    return starts
