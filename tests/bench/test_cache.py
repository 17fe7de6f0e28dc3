"""The cache: what goes in comes out, interrupted writes leave nothing, old entries make room."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch

from sae_lens_matryoshka.bench.cache import Cache, Entry


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
    bound = 50 if on_disk else min(50, round(cache.max_bytes / 10**9))
    assert f"of at most {bound} GB" in str(cache)


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


def test_what_is_kept_in_memory_leaves_half_of_it_free():
    assert Cache(max_bytes=10**15).max_bytes < psutil.virtual_memory().total / 2


def test_no_file_is_touched_that_the_cache_cannot_have_written(tmp_path: Path):
    """Somebody's weights in the same folder are neither counted nor removed."""
    theirs = [tmp_path / name for name in ("model.safetensors", f"{'g' * 32}.safetensors", "notes.json")]
    for path in theirs:
        path.write_bytes(b"x" * 20_000)
    cache = Cache(tmp_path, max_bytes=5_000)
    for index in range(5):
        cache.get_or_compute({"index": index}, lambda: _entry(500))
    assert 0 < cache.n_bytes <= 5_000
    assert all(path.is_file() for path in theirs)


def test_what_killed_processes_have_left_is_swept_and_what_is_being_written_is_not(tmp_path: Path):
    for name, age in ((".writing-dead", 7200), (".writing-alive", 60)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "entry").touch()
        for path in (tmp_path / name / "entry", tmp_path / name):
            os.utime(path, (time.time() - age, time.time() - age))
    Cache(tmp_path).get_or_compute({}, _entry)
    assert [path.name for path in tmp_path.glob(".*")] == [".writing-alive"]


def test_a_folder_that_cannot_be_written_is_said_once_and_still_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    Cache(tmp_path).get_or_compute({"a": 1}, _entry)

    def read_only(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.mkdtemp", read_only)
    cache = Cache(tmp_path)
    assert cache.get_or_compute({"a": 1}, _never).values
    for index in range(3):
        assert cache.get_or_compute({"b": index}, _entry).values
    assert len(caplog.records) == 1
    assert "cannot be written ([Errno 30] Read-only file system); going on without" in caplog.text


def _hammer(folder: Path, seed: int) -> int:
    cache = Cache(folder, max_bytes=12_000)
    for call in range(150):
        index = (seed * 7 + call * 13) % 9
        entry = cache.get_or_compute({"index": index}, lambda index=index: Entry({"x": torch.full((500,), index)}))
        assert entry.tensors["x"].eq(index).all()
    return seed


def test_processes_that_share_a_folder_evict_each_others_entries_without_harm(tmp_path: Path):
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda seed: _hammer(tmp_path, seed), range(4))) == [0, 1, 2, 3]
