"""The selection against sorting the whole batch, with every guess that can be wrong."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lens_matryoshka.ops import selection as selection_module
from sae_lens_matryoshka.ops.selection import (
    Selection,
    select_batch_topk,
    select_batch_topk_reference,
    select_topk,
    select_topk_reference,
)


def _problem(seed: int, batch: int, d_sae: int, bias: float, scaled: bool):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 5, generator=generator, dtype=torch.float64)
    W_enc = torch.randn(5, d_sae, generator=generator, dtype=torch.float64)
    b_enc = torch.randn(d_sae, generator=generator, dtype=torch.float64) + bias
    scale = torch.rand(d_sae, generator=generator, dtype=torch.float64) + 0.1 if scaled else None
    return x, W_enc, b_enc, scale


def _assert_same(ours: Selection, reference: Selection):
    def as_dict(selection: Selection) -> dict[tuple[int, int], tuple[float, float]]:
        entries = zip(*(values.tolist() for values in selection), strict=True)
        return {(row, column): (hidden_pre, score) for row, column, hidden_pre, score in entries}

    first, second = as_dict(ours), as_dict(reference)
    assert first.keys() == second.keys()
    assert len(first) == ours.rows.numel()
    for entry, values in first.items():
        assert values == pytest.approx(second[entry], rel=1e-9)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 12),
    d_sae=st.integers(1, 40),
    share=st.floats(0, 1),
    guess_factor=st.sampled_from([0.0, 0.01, 0.5, 0.99, 1.0, 1.01, 1.2, 100.0, -3.0]),
    bias=st.sampled_from([0.0, -3.0, -100.0, 50.0]),
    scaled=st.booleans(),
    chunk_elements=st.sampled_from([1, 30, 10**6]),
)
def test_the_selection_is_that_of_a_sort_whatever_the_guess(
    seed: int,
    batch: int,
    d_sae: int,
    share: float,
    guess_factor: float,
    bias: float,
    scaled: bool,
    chunk_elements: int,
):
    problem = _problem(seed, batch, d_sae, bias, scaled)
    n = int(share * batch * d_sae)
    reference = select_batch_topk_reference(*problem, n)
    guess = guess_factor * (reference.scores.min().item() if reference.scores.numel() else 1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection_module, "CHUNK_ELEMENTS", chunk_elements)
        _assert_same(select_batch_topk(*problem, n, guess), reference)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 12),
    d_sae=st.integers(1, 40),
    share=st.floats(0.01, 1),
    guess=st.sampled_from([-1.0, 0.0, 0.5, 2.0, 5.0, 100.0]),
    bias=st.sampled_from([0.0, -3.0, -100.0, 50.0]),
    scaled=st.booleans(),
)
def test_topk_of_each_sample_is_that_of_a_sort_whatever_the_guess(
    seed: int, batch: int, d_sae: int, share: float, guess: float, bias: float, scaled: bool
):
    problem = _problem(seed, batch, d_sae, bias, scaled)
    k = max(1, int(share * d_sae))
    _assert_same(select_topk(*problem, k, guess), select_topk_reference(*problem, k))


def test_ties_fill_the_selection_exactly():
    x, W_enc = torch.ones(4, 1), torch.ones(1, 6)
    for guess in (0.0, 1.0, 2.0):
        selection = select_batch_topk(x, W_enc, torch.zeros(6), None, 10, guess)
        assert selection.scores.tolist() == [1.0] * 10
        assert len(set(zip(selection.rows.tolist(), selection.columns.tolist(), strict=True))) == 10


def test_nothing_positive_and_nothing_wanted():
    problem = _problem(0, 4, 6, -1000.0, False)
    assert select_batch_topk(*problem, 10).rows.numel() == 0
    assert select_batch_topk(*_problem(0, 4, 6, 0.0, False), 0).rows.numel() == 0


def test_a_dead_decoder_row_is_never_selected():
    x, W_enc, b_enc, scale = _problem(0, 4, 6, 5.0, True)
    assert scale is not None
    scale[2] = 0.0
    assert 2 not in select_batch_topk(x, W_enc, b_enc, scale, 24).columns


def test_float32_agrees_with_the_reference_in_all_but_rounding_ties():
    x, W_enc, b_enc, scale = (t.float() for t in _problem(3, 200, 300, 0.0, True) if t is not None)
    ours = select_batch_topk(x, W_enc, b_enc, scale, 1500, 3.0)
    reference = select_batch_topk_reference(x, W_enc, b_enc, scale, 1500)
    torch.testing.assert_close(ours.scores.sort().values, reference.scores.sort().values)
