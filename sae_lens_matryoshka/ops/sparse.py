"""The two library kernels that all sparse products here come down to, and the compressed rows that they read."""

import warnings

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta", category=UserWarning)


def weighted_row_sums(
    table: Float[Tensor, "n_rows width"],
    rows: Int[Tensor, " n"],
    weights: Float[Tensor, " n"],
    starts: Int[Tensor, " n_groups_plus_1"],
) -> Float[Tensor, "n_groups width"]:
    """For each group of entries the sum of ``weights * table[rows]``: compressed sparse rows times a dense matrix.

    ``embedding_bag`` does it twice as fast as torch's CSR product on CPU, which in turn does it three times as fast on
    CUDA (benchmarks/README.md).
    """
    n_groups = starts.numel() - 1
    if rows.numel() == 0:
        return table.new_zeros(n_groups, table.shape[1])
    if table.is_cuda:
        groups = torch.sparse_csr_tensor(starts, rows, weights, (n_groups, table.shape[0]), check_invariants=False)
        with torch.autocast("cuda", enabled=False):
            return groups @ table
    return embedding_bag(rows, table, starts, mode="sum", per_sample_weights=weights, include_last_offset=True)


def sampled_products(
    left: Float[Tensor, "n_rows width"],
    right: Float[Tensor, "n_columns width"],
    columns: Int[Tensor, " n"],
    starts: Int[Tensor, " n_rows_plus_1"],
) -> Float[Tensor, " n"]:
    """The inner products <left[row], right[column]> at the entries of a matrix in compressed rows, and nowhere else."""
    pattern = torch.sparse_csr_tensor(
        starts, columns, left.new_zeros(columns.numel()), (left.shape[0], right.shape[0]), check_invariants=False
    )
    return torch.sparse.sampled_addmm(pattern, left, right.t(), beta=0.0).values()


def group_starts(groups: Int[Tensor, " n"], n_groups: int) -> Int[Tensor, " n_groups_plus_1"]:
    """Where the entries of each group start, given the ascending group of each; the GPU is not waited for."""
    return torch.searchsorted(groups, torch.arange(n_groups + 1, device=groups.device))
