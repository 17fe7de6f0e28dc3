"""The law of drawn prefixes against the one of Nabeshima's code, and its errors."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sae_lens_matryoshka import PrefixSampling


@given(
    n_prefixes=st.integers(2, 8),
    min_width=st.integers(1, 20),
    extra=st.integers(0, 100),
    power=st.floats(0.1, 3),
    seed=st.integers(0, 99),
    step=st.integers(0, 10**6),
)
def test_prefixes_rise_from_the_smallest_allowed_to_the_full_width(
    n_prefixes: int, min_width: int, extra: int, power: float, seed: int, step: int
):
    d_sae = min_width + n_prefixes - 1 + extra
    law = PrefixSampling(n_prefixes, min_width, power, seed)
    widths = law.draw(d_sae, step)
    assert len(widths) == n_prefixes
    assert widths == sorted(set(widths))
    assert widths[0] >= min_width
    assert widths[-1] == d_sae
    assert widths == PrefixSampling(n_prefixes, min_width, power, seed).draw(d_sae, step)  # nothing is remembered


def test_drawn_lengths_follow_the_published_law():
    """Probabilities as ``get_pareto_prefix_bounds`` of noanabeshima/matryoshka-saes makes them (chi-squared test)."""
    d_sae, min_width, power, n_steps = 40, 4, 0.5, 20_000
    survival = 1 - (np.arange(d_sae - min_width + 1) / (d_sae - min_width + 1)) ** power
    published = -(survival[1:] - survival[:-1])
    published /= published.sum()
    law = PrefixSampling(2, min_width, power)
    np.testing.assert_allclose(law.probabilities(d_sae), published, rtol=1e-12)
    drawn = [law.draw(d_sae, step)[0] for step in range(n_steps)]
    counts = np.bincount(drawn, minlength=d_sae)[min_width:]
    assert stats.chisquare(counts, published * n_steps).pvalue > 1e-3
    uniform = np.full_like(published, 1 / len(published))
    assert stats.chisquare(counts, uniform * n_steps).pvalue < 1e-9  # so the test can tell laws apart
    other_seed = [PrefixSampling(2, min_width, power, seed=1).draw(d_sae, step)[0] for step in range(20)]
    assert other_seed != drawn[:20]


def test_several_lengths_are_drawn_one_after_the_other_without_repetition():
    """How often each length is among 5 drawn, against draws made one by one from what is left."""
    d_sae, n_steps = 12, 20_000
    law = PrefixSampling(6)
    ours = np.bincount(np.ravel([law.draw(d_sae, step)[:-1] for step in range(n_steps)]), minlength=d_sae)[1:]
    generator, expected = np.random.default_rng(0), np.zeros(d_sae - 1)
    for _ in range(n_steps):
        left = law.probabilities(d_sae).copy()
        for _ in range(5):
            drawn = np.searchsorted(left.cumsum() / left.sum(), generator.random())
            expected[drawn] += 1
            left[drawn] = 0
    np.testing.assert_allclose(ours, expected, rtol=0.05)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_prefix": 3}, "must be a mapping with the keys n_prefixes, min_width, pareto_power, seed"),
        ([3], "must be a mapping"),
        ({"n_prefixes": 1}, r"prefix_sampling\.n_prefixes=1 must be a whole number of at least 2"),
        ({"n_prefixes": 3.5}, r"n_prefixes=3\.5 must be a whole number"),
        ({"min_width": 0}, "min_width=0 must be a whole number of at least 1"),
        ({"seed": -1}, "seed=-1 must be a whole number"),
        ({"pareto_power": 0}, "pareto_power=0 must be a positive number"),
        ({"n_prefixes": 10, "min_width": 92}, "needs 9 different lengths from min_width=92 to d_sae - 1 = 99"),
    ],
)
def test_laws_that_cannot_be_drawn_from(values: Any, message: str):
    with pytest.raises(ValueError, match=message):
        PrefixSampling.from_dict(values, 100)
