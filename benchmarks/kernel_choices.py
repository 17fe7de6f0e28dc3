"""The library kernels that a sparse training step could be made of, timed one by one.

python benchmarks/kernel_choices.py
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from contenders import Shape
from torch.nn.functional import embedding_bag
from train_step import machine


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="768/16384/2048/40", metavar="D_IN/D_SAE/BATCH/K")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"{machine('cpu')}; d_in/d_sae/batch/k = {options.shape}\n")
    print("| operation | kernel | ms |\n|---|---|---|")
    for operation, name, kernel in kernels(Shape.parse(options.shape)):
        kernel()
        times: list[float] = []
        for _ in range(options.repeats):
            start = time.perf_counter()
            kernel()
            times.append(time.perf_counter() - start)
        print(f"| {operation} | {name} | {statistics.median(times) * 1e3:.0f} |", flush=True)


def kernels(shape: Shape) -> list[tuple[str, str, Callable[[], object]]]:
    """What to time, as operation, kernel and call, on random non-zeros."""
    torch.manual_seed(0)
    d_in, d_sae, batch = shape.d_in, shape.d_sae, shape.batch
    x, residual, W = torch.randn(batch, d_in), torch.randn(batch, d_in), torch.randn(d_sae, d_in)
    by_row = W.t().contiguous()
    n = batch * shape.k
    flat = torch.randperm(batch * d_sae)[:n].sort().values
    rows, columns, values = flat // d_sae, flat % d_sae, torch.rand(n)
    row_starts = torch.searchsorted(rows, torch.arange(batch + 1))
    order = columns.argsort()
    column_starts = torch.searchsorted(columns[order], torch.arange(d_sae + 1))
    sparse = torch.sparse_csr_tensor(row_starts, columns, values, (batch, d_sae))
    transposed = torch.sparse_csr_tensor(column_starts, rows[order], values[order], (d_sae, batch))
    whole, chunk = torch.empty(batch, d_sae), torch.empty(batch, 2048)
    threshold = (x @ by_row).flatten().kthvalue(batch * d_sae - n).values.item()

    def in_chunks(select: bool) -> None:
        for start in range(0, d_sae, 2048):
            torch.mm(x, W.t()[:, start : start + 2048], out=chunk)
            if select:
                (chunk > threshold).flatten().nonzero()

    def gathered(multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        for start in range(0, n, 2048):
            part = slice(start, start + 2048)
            multiply(W[columns[part]], residual[rows[part]])

    def adam(fused: bool | None = None, foreach: bool | None = None) -> Callable[[], object]:
        parameters = [torch.nn.Parameter(torch.randn_like(W)) for _ in range(2)]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        return torch.optim.Adam(parameters, fused=fused, foreach=foreach).step

    def summed(table: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        return embedding_bag(ids, table, starts, mode="sum", per_sample_weights=weights, include_last_offset=True)

    def added() -> torch.Tensor:
        return torch.zeros(d_sae, d_in).index_add_(0, columns, residual[rows] * values[:, None])

    return [
        ("encoder product", "whole, W_enc by row", lambda: torch.mm(x, by_row, out=whole)),
        ("encoder product", "whole, W_enc by column", lambda: torch.mm(x, W.t(), out=whole)),
        ("encoder product", "chunks of 2048 columns", lambda: in_chunks(False)),
        ("product and selection", "chunks and comparison", lambda: in_chunks(True)),
        ("selection", "topk of the flattened batch", lambda: whole.flatten().topk(n)),
        ("weighted rows a sample", "embedding_bag", lambda: summed(W, columns, values, row_starts)),
        ("weighted rows a sample", "CSR product", lambda: sparse @ W),
        (
            "weighted rows a latent",
            "embedding_bag",
            lambda: summed(residual, rows[order], values[order], column_starts),
        ),
        ("weighted rows a latent", "CSR product", lambda: transposed @ residual),
        ("weighted rows a latent", "index_add_", added),
        ("inner products", "sampled_addmm", lambda: torch.sparse.sampled_addmm(sparse, residual, W.t(), beta=0.0)),
        ("inner products", "gathered, multiplied, summed", lambda: gathered(lambda a, b: (a * b).sum(-1))),
        ("inner products", "gathered, bmm", lambda: gathered(lambda a, b: torch.bmm(a[:, None], b[:, :, None]))),
        ("Adam, both matrices", "fused", adam(fused=True)),
        ("Adam, both matrices", "foreach", adam(foreach=True)),
        ("Adam, both matrices", "single tensor", adam(foreach=False)),
    ]


if __name__ == "__main__":
    main()
