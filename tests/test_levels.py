"""Widths against the paper's numbers, and every mistake a caller can make with them."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_lens_matryoshka.levels import (
    geometric_widths,
    level_index,
    level_of,
    paper_widths,
    validate_level_weights,
    validate_widths,
)


def test_paper_widths_of_gemma_2_2b():
    assert paper_widths(65536) == [2048, 6144, 14336, 30720, 65536]


@given(st.integers(32, 10**6))
def test_paper_widths_are_valid_for_every_size(d_sae: int):
    widths = paper_widths(d_sae)
    assert validate_widths(widths, d_sae) == widths
    assert len(widths) == 5


def test_paper_widths_of_a_tiny_dictionary_is_an_error():
    with pytest.raises(ValueError, match="d_sae=8 is too small"):
        paper_widths(8)


def test_geometric_widths():
    assert geometric_widths(64, 4) == [8, 16, 32, 64]
    assert geometric_widths(81, 3, ratio=3) == [9, 27, 81]
    assert geometric_widths(7, 1) == [7]


@pytest.mark.parametrize(
    ("n_levels", "ratio", "message"), [(0, 2.0, "n_levels=0"), (3, 1.0, "ratio=1.0"), (9, 2.0, "use fewer levels")]
)
def test_geometric_widths_errors(n_levels: int, ratio: float, message: str):
    with pytest.raises(ValueError, match=message):
        geometric_widths(64, n_levels, ratio)


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ([], r"matryoshka_widths=\[\] is empty.*for example \[2, 6, 14, 30, 64\]"),
        ("8,64", "must be a list"),
        (8, "must be a list"),
        ([8.5, 64], r"matryoshka_widths=\[8.5, 64\]: 8.5 is not a whole number"),
        ([True, 64], "True is not a whole number"),
        (["8", 64], "'8' is not a whole number"),
        ([0, 64], "0 is not positive"),
        ([-8, 64], "-8 is not positive"),
        ([8, 8, 64], r"8 is repeated; use \[8, 64\]"),
        ([16, 8, 64], r"8 comes after 16; use \[8, 16, 64\]"),
        ([8, 65], "65 is above d_sae=64"),
    ],
)
def test_unusable_widths_are_named_with_a_remedy(widths: object, message: str):
    with pytest.raises(ValueError, match=message):
        validate_widths(widths, 64)  # type: ignore[arg-type]


def test_a_missing_full_level_is_added_to_a_copy_with_a_warning():
    given_widths = [8, 16]
    with pytest.warns(UserWarning, match="the full level of width 64 is added"):
        assert validate_widths(given_widths, 64) == [8, 16, 64]
    assert given_widths == [8, 16]


def test_complete_widths_come_back_as_a_new_list_of_ints_without_a_warning():
    given_widths = [np.int64(8), 64]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checked = validate_widths(given_widths, 64)
    assert checked == [8, 64]
    assert all(type(width) is int for width in checked)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "one weight for each of the 2 levels"),
        (2.0, "one weight for each of the 2 levels"),
        ([1.0, -1.0], "-1.0 is negative"),
        ([1.0, float("nan")], "nan is not a finite number"),
        ([1.0, float("inf")], "inf is not a finite number"),
        ([1.0, "1"], "'1' is not a finite number"),
        ([0.0, 0], "all zero"),
    ],
)
def test_unusable_level_weights(weights: object, message: str):
    with pytest.raises(ValueError, match=f"level_weights=.*{message}"):
        validate_level_weights(weights, 2)  # type: ignore[arg-type]


def test_level_index_counts_from_either_end_and_lists_the_levels_when_out_of_range():
    assert [level_index(level, [4, 8]) for level in (0, 1, -1, -2)] == [0, 1, 1, 0]
    for level in (2, -3):
        with pytest.raises(IndexError, match=rf"level {level} is out of range: .* 0 \(width 4\), 1 \(width 8\)"):
            level_index(level, [4, 8])


@given(st.lists(st.integers(1, 50), min_size=1, unique=True).map(sorted), st.data())
def test_level_of_is_the_first_level_that_contains_the_latent(widths: list[int], data: st.DataObject):
    ids = data.draw(st.lists(st.integers(0, widths[-1] - 1), max_size=10))
    expected = [next(level for level, width in enumerate(widths) if latent < width) for latent in ids]
    assert level_of(ids, widths).tolist() == expected


def test_level_of_keeps_the_shape_and_refuses_latents_that_do_not_exist():
    assert level_of(torch.tensor([[0, 3], [4, 7]]), [4, 8]).tolist() == [[0, 0], [1, 1]]
    assert level_of(5, [4, 8]).item() == 1
    for latent in (-1, 8):
        with pytest.raises(IndexError, match=r"must lie in 0..7"):
            level_of([latent], [4, 8])
