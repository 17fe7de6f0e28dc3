"""The cache: what goes in comes out, interrupted writes leave nothing, old entries make room."""

from pathlib import Path

import pytest
import torch

from sae_lens_matryoshka.bench.cache import Cache, Entry, module_hash


def _entry(size: int = 4) -> Entry:
    return Entry({"x": torch.arange(float(size))}, {"accuracy": {"a": 0.5}})


def _never() -> Entry:
    raise AssertionError("computed again")


@pytest.mark.parametrize("on_disk", [False, True])
def test_an_entry_is_computed_once(on_disk: bool, tmp_path: Path):
    cache = Cache(tmp_path / "cache" if on_disk else None)
    cache.get_or_compute({"a": 1}, _entry)
    again = cache.get_or_compute({"a": 1}, _never)
    assert again.tensors["x"].equal(_entry().tensors["x"])
    assert again.values == {"accuracy": {"a": 0.5}}
    with pytest.raises(AssertionError, match="computed again"):
        cache.get_or_compute({"a": 2}, _never)
    assert "of at most 50 GB" in str(cache)


def test_another_process_finds_it_and_can_read_what_it_is(tmp_path: Path):
    Cache(tmp_path).get_or_compute({"kind": "activations"}, _entry)
    assert Cache(tmp_path).get_or_compute({"kind": "activations"}, _never).values
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]
    assert "activations" in next(tmp_path.glob("*.json")).read_text()


def test_an_interrupted_computation_and_a_damaged_file_are_made_again(tmp_path: Path):
    def interrupted() -> Entry:
        raise KeyboardInterrupt

    cache = Cache(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        cache.get_or_compute({}, interrupted)
    assert list(tmp_path.iterdir()) == []
    cache.get_or_compute({}, _entry)
    path = next(tmp_path.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:20])
    assert cache.get_or_compute({}, _entry).values
    assert cache.get_or_compute({}, _never).values


@pytest.mark.parametrize("on_disk", [False, True])
def test_the_least_recently_used_make_room(on_disk: bool, tmp_path: Path):
    cache = Cache(tmp_path if on_disk else None, max_bytes=10_000)
    for index in range(5):
        cache.get_or_compute({"index": index}, lambda: _entry(1000))
        assert cache.n_bytes <= 10_000
    cache.get_or_compute({"index": 4}, _never)
    with pytest.raises(AssertionError, match="computed again"):
        cache.get_or_compute({"index": 0}, _never)
    cache.get_or_compute({"index": "large"}, lambda: _entry(10_000))  # larger than the bound: not kept
    assert cache.n_bytes <= 10_000


def test_a_changed_parameter_is_another_module():
    first, second = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    second.load_state_dict(first.state_dict())
    assert module_hash(first) == module_hash(second)
    with torch.no_grad():
        second.bias[0] += 1e-6
    assert module_hash(first) != module_hash(second)
