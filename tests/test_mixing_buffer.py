"""Our mixing buffer beside SAELens's: the same batches, with its state saved and taken up at any moment."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens.training.mixing_buffer import mixing_buffer

from sae_lens_matryoshka.training.resuming.mixing_buffer import ResumableMixingBuffer

shapes = st.tuples(
    st.integers(1, 12),  # batch
    st.integers(0, 40),  # how much larger the buffer is
    st.floats(0, 1),  # share kept for mixing
    st.lists(st.integers(0, 25), min_size=5, max_size=25),  # lengths of what is loaded
    st.integers(0, 10_000),  # seed
)


def _loads(lengths: list[int]) -> list[torch.Tensor]:
    values = torch.arange(3 * sum(lengths), dtype=torch.float32).reshape(-1, 3)
    return list(values.split(lengths))


def _ours(loads: list[torch.Tensor], batch_size: int, extra: int, mix_fraction: float, seed: int):
    generator = torch.Generator().manual_seed(seed)
    return ResumableMixingBuffer(iter(loads), batch_size + extra, batch_size, mix_fraction, generator)


@settings(max_examples=60, deadline=None)
@given(shapes)
def test_the_batches_are_those_of_saelens(shape: tuple[int, int, float, list[int], int]):
    batch_size, extra, mix_fraction, lengths, seed = shape
    torch.manual_seed(seed)
    theirs = list(mixing_buffer(batch_size + extra, batch_size, iter(_loads(lengths)), mix_fraction))
    ours = list(_ours(_loads(lengths), batch_size, extra, mix_fraction, seed))
    # SAELens serves the rest when there is nothing left to load, which the store's stream never is
    assert len(ours) <= len(theirs)
    for one, other in zip(ours, theirs, strict=False):
        assert torch.equal(one, other)
    assert sum(map(len, theirs)) - sum(map(len, ours)) <= max(batch_size + extra, 1) + batch_size


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(0, 15))
def test_taken_up_in_the_middle_it_goes_on_alike(shape: tuple[int, int, float, list[int], int], n_before: int):
    batch_size, extra, mix_fraction, lengths, seed = shape
    loads = iter(_loads(lengths))
    first = _ours([], batch_size, extra, mix_fraction, seed)
    first.activations_loader = loads
    for _ in zip(range(n_before), first, strict=False):
        pass
    second = _ours([], batch_size, extra, mix_fraction, seed=0)
    second.generator.set_state(first.generator.get_state())
    second.activations = None if first.activations is None else first.activations.clone()
    second.n_batches_ready = first.n_batches_ready
    rest = list(loads)
    first.activations_loader, second.activations_loader = iter(rest), iter(rest)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match=r"buffer_size=3 must be at least batch_size=4"):
        ResumableMixingBuffer(iter([]), 3, 4, 0.5, torch.Generator())
    with pytest.raises(ValueError, match=r"mix_fraction=1.5 must be in \[0, 1\]"):
        ResumableMixingBuffer(iter([]), 5, 4, 1.5, torch.Generator())
