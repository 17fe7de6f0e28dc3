"""Finding the latents that are kept without making or sorting the batch x d_sae matrix, yet exactly.

The n largest pre-activations of a batch all lie above some floor. Last step's smallest selected value, lowered a
little, is a good guess of one: a single comparison pass over each chunk of columns then leaves slightly more than n
candidates, and an exact ``topk`` of those few is the selection. A guess that was too high leaves too few candidates and
the pass is repeated from floor 0. A floor that is too low is raised on the way, since the n-th largest of the
candidates so far bounds the final one from below.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_matryoshka.ops.sparse import group_starts

CHUNK_ELEMENTS = 4 * 2**20
"""Pre-activations computed at once on CPU: 16 MB in float32, few enough to stay in or near the cache."""

GPU_CHUNK_ELEMENTS = 2**27
"""The same on other devices: 0.5 GB in float32, enough for a product at full speed (benchmarks/README.md)."""

GUESS_MARGIN = 0.95
"""The floor as a share of last step's smallest selected value. That value moves by a few per cent between steps."""

MOST_CANDIDATES = 4
"""Candidates kept before the floor is raised, as a multiple of the number to select."""


class Selection(NamedTuple):
    """The entries of a batch x d_sae matrix that are kept, in no particular order."""

    rows: Int[Tensor, " n"]
    """The sample of each entry."""

    columns: Int[Tensor, " n"]
    """The latent of each entry."""

    hidden_pre: Float[Tensor, " n"]
    """Its pre-activation: ``x @ W_enc + b_enc``."""

    scores: Float[Tensor, " n"]
    """What was compared: the pre-activation times the scale of its column."""


def select_batch_topk_reference(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    column_scale: Float[Tensor, " d_sae"] | None,
    n: int,
) -> Selection:
    """The ``n`` largest positive scores of a batch, found by sorting all of them (arXiv:2412.06410).

    Args:
        x: The input of the encoder.
        W_enc: Encoder weights.
        b_enc: Encoder bias.
        column_scale: What pre-activations are multiplied by for the comparison, such as decoder norms; None for 1.
        n: How many to select; fewer are if fewer scores are positive.
    """
    hidden_pre = x @ W_enc + b_enc
    scores = hidden_pre if column_scale is None else hidden_pre * column_scale
    values, indices = scores.flatten().topk(n)
    indices, values = indices[values > 0], values[values > 0]
    rows, columns = indices // W_enc.shape[1], indices % W_enc.shape[1]
    return Selection(rows, columns, hidden_pre[rows, columns], values)


@torch.no_grad()
def select_batch_topk(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    column_scale: Float[Tensor, " d_sae"] | None,
    n: int,
    guess: "float | Float[Tensor, '']" = 0.0,
) -> Selection:
    """The ``n`` largest positive scores of a batch; the same as :func:`select_batch_topk_reference`, ties aside.

    Under autocast the product is computed in the autocast data type, as SAELens's is. Contiguous columns of ``W_enc``
    are fastest. ``guess`` is the smallest score expected to be selected, for example that of the last step; it affects
    the speed only. (As a tensor, so that a GPU is not waited for.)
    """
    floor = (torch.as_tensor(guess, device=x.device) * GUESS_MARGIN).clamp(min=0.0)
    selection = _largest(_candidates_above(floor, x, W_enc, b_enc, column_scale, n), n)
    # all scores above the floor are among the candidates, so n of them are the n largest
    complete = selection.scores.numel() == n and (n == 0 or bool((selection.scores.min() > floor) | (floor == 0)))
    if complete or floor == 0:
        return selection
    return _largest(_candidates_above(torch.zeros_like(floor), x, W_enc, b_enc, column_scale, n), n)


def select_topk_reference(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    column_scale: Float[Tensor, " d_sae"] | None,
    k: int,
) -> Selection:
    """The ``k`` largest positive scores of each sample, found by sorting all of them (arXiv:2406.04093).

    Args:
        x: The input of the encoder.
        W_enc: Encoder weights.
        b_enc: Encoder bias.
        column_scale: What pre-activations are multiplied by for the comparison; None for 1.
        k: How many to select a sample; fewer are if fewer scores are positive.
    """
    hidden_pre = x @ W_enc + b_enc
    scores = hidden_pre if column_scale is None else hidden_pre * column_scale
    values, columns = scores.topk(k, dim=-1)
    rows = torch.arange(x.shape[0], device=x.device).repeat_interleave(k)
    rows, columns, values = (part[values.flatten() > 0] for part in (rows, columns.flatten(), values.flatten()))
    return Selection(rows, columns, hidden_pre[rows, columns], values)


@torch.no_grad()
def select_topk(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    column_scale: Float[Tensor, " d_sae"] | None,
    k: int,
    guess: "float | Float[Tensor, '']",
) -> Selection:
    """The ``k`` largest positive scores of each sample; the same as :func:`select_topk_reference`, ties aside.

    One comparison pass finds the candidates of all samples above ``guess``; samples left with fewer than ``k`` of them
    are sorted by themselves. Most samples' k-th largest score is expected to lie above ``guess``, which affects the
    speed only.
    """
    batch = x.shape[0]
    guess = torch.as_tensor(guess, device=x.device)
    if guess <= 0:  # nearly every positive score would be a candidate
        return _sorted_by_themselves(torch.arange(batch, device=x.device), x, W_enc, b_enc, column_scale, k)
    candidates = _candidates_above(guess, x, W_enc, b_enc, column_scale, batch * W_enc.shape[1])
    by_score = candidates.scores.argsort(descending=True)
    order = by_score[candidates.rows[by_score].argsort(stable=True)]
    rows = candidates.rows[order]
    rank = torch.arange(rows.numel(), device=x.device) - group_starts(rows, batch)[rows]
    above_guess = (candidates.scores > guess).to(rows.dtype)
    enough = rows.new_zeros(batch).index_add(0, candidates.rows, above_guess) >= k
    kept = order[(rank < k) & enough[rows]]
    found = [Selection(*(values[kept] for values in candidates))]
    short = (~enough).nonzero().squeeze(1)
    if short.numel() > 0:
        found.append(_sorted_by_themselves(short, x, W_enc, b_enc, column_scale, k))
    return _concatenated(found)


def _sorted_by_themselves(
    samples: Int[Tensor, " n"], x: Tensor, W_enc: Tensor, b_enc: Tensor, column_scale: Tensor | None, k: int
) -> Selection:
    """The selection of some samples by sorting all their scores, a few samples at a time."""
    found: list[Selection] = []
    for rows in samples.split(max(1, _chunk_elements(x.device) // W_enc.shape[1])):
        selection = select_topk_reference(x[rows], W_enc, b_enc, column_scale, k)
        found.append(selection._replace(rows=rows[selection.rows]))
    return _concatenated(found)


@torch.no_grad()
def select_above(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    floor: Float[Tensor, " d_sae"],
    most: int,
) -> Selection | None:
    """All pre-activations above the floor of their latent, or None as soon as more than ``most`` have been found.

    Args:
        x: The input of the encoder.
        W_enc: Encoder weights, fastest if their columns are contiguous.
        b_enc: Encoder bias.
        floor: What each latent's pre-activation must exceed.
        most: How many entries are worth listing.
    """
    found: list[Selection] = []
    n_found = 0
    for columns, product in column_products(x, W_enc):
        hidden_pre = product.to(b_enc.dtype) + b_enc[columns]
        above = (hidden_pre > floor[columns]).flatten().nonzero().squeeze(1)
        n_found += above.numel()
        if n_found > most:
            return None
        rows, offsets = above // product.shape[1], above % product.shape[1]
        values = hidden_pre.flatten()[above]
        found.append(Selection(rows, offsets + columns.start, values, values.clone()))
    return _concatenated(found)


def column_products(
    x: Float[Tensor, "batch d_in"], W_enc: Float[Tensor, "d_in d_sae"]
) -> Iterator[tuple[slice, Tensor]]:
    """``x @ W_enc`` column chunk by column chunk, in the autocast data type where autocast is on.

    Yields:
        Which columns, and their product, which is written over the one before.
    """
    batch, d_sae = x.shape[0], W_enc.shape[1]
    device_type = x.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype
    x_cast = x.to(dtype)
    width = min(d_sae, max(1, _chunk_elements(x.device) // max(1, batch)))
    buffer = x.new_empty(batch * width, dtype=dtype)
    for start in range(0, d_sae, width):
        columns = slice(start, min(start + width, d_sae))
        product = buffer[: batch * (columns.stop - start)].view(batch, -1)
        with torch.autocast(device_type, enabled=False):
            torch.mm(x_cast, W_enc[:, columns].to(dtype), out=product)
        yield columns, product


def _chunk_elements(device: torch.device) -> int:
    return CHUNK_ELEMENTS if device.type == "cpu" else GPU_CHUNK_ELEMENTS


def _candidates_above(
    floor: Float[Tensor, ""], x: Tensor, W_enc: Tensor, b_enc: Tensor, column_scale: Tensor | None, n: int
) -> Selection:
    """All entries that score above ``floor``, or above a higher one that ``n`` entries reach, and some just below."""
    found: list[Selection] = []
    n_found = 0
    for chunk, product in column_products(x, W_enc):
        bias, scale = b_enc[chunk], None if column_scale is None else column_scale[chunk]
        # Comparing the bare product with a bound a column saves two passes over the chunk. The bound is a little low,
        # so that rounding cannot lose an entry.
        bound = (floor * (1 - 1e-4)) / scale - bias if scale is not None else floor * (1 - 1e-4) - bias
        above = (product > bound).flatten().nonzero().squeeze(1)
        rows, columns = above // product.shape[1], above % product.shape[1]
        hidden_pre = product.flatten()[above].to(bias.dtype) + bias[columns]
        scores = hidden_pre if scale is None else hidden_pre * scale[columns]
        found.append(Selection(rows, columns + chunk.start, hidden_pre, scores))
        n_found += scores.numel()
        if n_found > MOST_CANDIDATES * n:
            found = [_largest(_concatenated(found), n)]
            n_found = found[0].scores.numel()
            floor = found[0].scores.min() if n > 0 else torch.full_like(floor, torch.inf)
    return _concatenated(found)


def _largest(candidates: Selection, n: int) -> Selection:
    if candidates.scores.numel() <= n:
        return candidates
    kept = candidates.scores.topk(n, sorted=False).indices
    return Selection(*(values[kept] for values in candidates))


def _concatenated(parts: list[Selection]) -> Selection:
    return Selection(*(torch.cat(values) for values in zip(*parts, strict=True)))
