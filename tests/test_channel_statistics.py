"""Means and standard deviations of channels, by stream and by definition, and what a few extreme samples do to them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from sae_lens_matryoshka.measuring.channel_statistics import (
    REFERENCE_SAMPLES,
    RunningChannelStatistics,
    channel_statistics_reference,
)


def _activations(n: int, d_in: int = 6, seed: int = 0) -> torch.Tensor:
    """Activations like a real model's: one channel of mean 5,000 that varies ten times as much as the others."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d_in, generator=generator) * torch.linspace(1, 30, d_in)
    x[:, 3] = 5000 + 300 * torch.randn(n, generator=generator)
    return x


def _running(batches: tuple[torch.Tensor, ...] | list[torch.Tensor]) -> RunningChannelStatistics:
    running = RunningChannelStatistics()
    for batch in batches:
        running.add(batch)
    return running


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 3 * REFERENCE_SAMPLES), st.integers(1, 5000), st.integers(0, 99))
def test_a_stream_gives_what_all_samples_at_once_give(n: int, batch_size: int, seed: int):
    x = _activations(n, seed=seed)
    x[:: max(2, n // 7)] *= 30
    batches = x.split(batch_size)
    n_reference = min(n, -(-REFERENCE_SAMPLES // batch_size) * batch_size)
    expected = channel_statistics_reference(x, n_reference)
    assert expected.n_samples >= 2 or n < 4
    if expected.n_samples < 2:
        with pytest.raises(ValueError, match="two at least"):
            _running(batches).result()
        return
    ours = _running(batches).result()
    assert ours[2:] == expected[2:]
    assert_close(ours.mean, expected.mean, rtol=1e-12, atol=1e-12)
    assert_close(ours.standard_deviation, expected.standard_deviation, rtol=1e-9, atol=1e-12)


def test_a_few_samples_of_norm_77000_change_nothing():
    x = _activations(20_000)
    with_extreme = x.clone()
    with_extreme[::1000] = torch.nn.functional.normalize(torch.randn(20, 6), dim=-1) * 77_000
    clean, ours = _running([x]).result(), _running(list(with_extreme.split(512))).result()
    assert ours.n_left_out == pytest.approx(clean.n_left_out + 20, abs=1)  # ordinary ones at the edge
    assert_close(ours.mean, clean.mean, rtol=1e-2, atol=1)
    assert_close(ours.standard_deviation, clean.standard_deviation, rtol=1e-2, atol=0)
    assert with_extreme.std(0).max() > 1.5 * clean.standard_deviation.max()  # which they do change


def test_samples_that_are_mostly_the_same_are_all_counted():
    x = torch.zeros(100, 4)
    x[:30] = torch.randn(30, 4)
    ours = _running([x]).result()
    assert ours.n_left_out == 0
    assert_close(ours.standard_deviation, x.double().std(0))


def test_what_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="1 values are not finite"):
        _running([torch.tensor([[1.0, torch.nan], [2.0, 3.0]])])
