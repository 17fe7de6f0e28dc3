"""The resumable store beside SAELens's: the same tokens and batches, and after a checkpoint the same ones again."""

import importlib
import json
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Array2D, Dataset, Features, IterableDataset, load_dataset
from sae_lens import ActivationsStore
from sae_lens.load_model import load_model
from torch import Tensor

from sae_lens_matryoshka.errors import UserError
from sae_lens_matryoshka.run_files.building import build_runner_configs
from sae_lens_matryoshka.text.data_set import open_data_set
from sae_lens_matryoshka.training.resuming.checked_store import CheckedActivationsStore
from sae_lens_matryoshka.training.resuming.resumable_store import ResumableActivationsStore
from tests.tiny_runs import tiny_run

HOOKS = ["model.layers.1", "model.layers.2"]
SETTINGS: dict[str, Any] = {
    "context_size": 24,
    "n_batches_in_buffer": 6,
    "total_training_tokens": 10_000,
    "store_batch_size_prompts": 3,
    "train_batch_size_tokens": 40,
    "prepend_bos": True,
    "normalize_activations": "none",
    "device": torch.device("cpu"),
    "dtype": "float32",
}
N_ROWS = 12
"""Few enough for several epochs."""


@pytest.fixture(scope="module")
def model(tinystories: Path) -> Any:
    return load_model("AutoModelForCausalLM", str(tinystories / "model"), "cpu", hook_names=HOOKS)


@pytest.fixture(scope="module")
def rows(tinystories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first lines of the TinyStories text in two files."""
    folder = tmp_path_factory.mktemp("rows")
    lines = (tinystories / "data" / "train.jsonl").read_text().splitlines()[:N_ROWS]
    (folder / "train-0.jsonl").write_text("\n".join(lines[:5]) + "\n")
    (folder / "train-1.jsonl").write_text("\n".join(lines[5:]) + "\n")
    return folder


def _text(rows: Path, streaming: bool) -> Any:
    files = [str(path) for path in sorted(rows.glob("*.jsonl"))]
    return load_dataset("json", data_files=files, split="train", streaming=streaming)


def _store(model: Any, dataset: Any, **changes: Any) -> ActivationsStore:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ActivationsStore(
            model=model,
            dataset=dataset,
            streaming=isinstance(dataset, IterableDataset),
            hook_name=HOOKS[0],
            hook_head_index=None,
            d_in=64,
            **{**SETTINGS, **changes},
        )


def _multi_hook_store(model: Any, dataset: Any) -> ActivationsStore:
    return ActivationsStore.from_config_multi_hook(
        model, dataset=dataset, hook_names=HOOKS, hook_d_ins=dict.fromkeys(HOOKS, 64), **SETTINGS
    )


def _take_over(store: ActivationsStore, max_buffer_bytes: int = 10**9) -> ResumableActivationsStore:
    return ResumableActivationsStore.take_over(store, max_buffer_bytes)


@pytest.mark.filterwarnings("ignore:All samples")
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"prepend_bos": False},
        {"sequence_separator_token": None},
        {"sequence_separator_token": "eos", "context_size": 7},
        {"disable_concat_sequences": True},
    ],
    ids=str,
)
def test_tokens_are_those_of_saelens(model: Any, rows: Path, streaming: bool, changes: dict[str, Any]):
    theirs = _store(model, _text(rows, streaming), **changes)
    ours = _take_over(_store(model, _text(rows, streaming), **changes))
    while ours.n_dataset_processed <= 2 * N_ROWS:  # into the third epoch
        assert torch.equal(ours.get_batch_tokens(), theirs.get_batch_tokens())
        assert ours.n_dataset_processed == theirs.n_dataset_processed


@pytest.mark.filterwarnings("ignore:All samples")
def test_batches_are_those_of_saelens_with_the_same_seed(model: Any, rows: Path):
    theirs, ours = _store(model, _text(rows, False)), _take_over(_store(model, _text(rows, False)))
    torch.manual_seed(3)
    expected = [next(theirs) for _ in range(30)]
    torch.manual_seed(3)
    for batch in expected:
        assert torch.equal(next(ours), batch)

    theirs, ours = (
        _multi_hook_store(model, _text(rows, False)),
        _take_over(_multi_hook_store(model, _text(rows, False))),
    )
    torch.manual_seed(4)
    their_batches = theirs.get_multi_hook_data_loader()
    expected_by_hook = [next(their_batches) for _ in range(30)]
    torch.manual_seed(4)
    our_batches = ours.get_multi_hook_data_loader()
    for expected_batch in expected_by_hook:
        batch = next(our_batches)
        assert list(batch) == HOOKS
        assert all(torch.equal(batch[name], expected_batch[name]) for name in HOOKS)


def _text_store(streaming: bool, **changes: Any) -> Callable[[Any, Path], ActivationsStore]:
    return lambda model, rows: _store(model, _text(rows, streaming), **changes)


def _torch_format_works() -> bool:
    """Whether data sets give tensors: datasets 3 asks torchvision for a class that newer releases have dropped."""
    if int(version("datasets").split(".")[0]) > 3 or find_spec("torchvision") is None:
        return True
    return hasattr(importlib.import_module("torchvision.io"), "VideoReader")


NEEDS_TORCH_FORMAT = pytest.mark.skipif(
    not _torch_format_works(), reason="datasets 3 cannot give tensors beside this torchvision (sae-bench needs both)"
)


def _tokenized_store(model: Any, rows: Path) -> ActivationsStore:
    tokens = torch.arange(40 * 30).reshape(40, 30) % 500
    return _store(model, Dataset.from_dict({"tokens": tokens.tolist()}))


def _file_store(model: Any, rows: Path) -> ActivationsStore:
    """The stream that a run reads where its data set is a folder of files."""
    run = tiny_run(rows.parent, None, dataset_path=str(rows), streaming=True)
    cfg: Any = build_runner_configs({**run, "model_name": "any"})
    return _store(model, open_data_set(cfg))


def _cached_store(model: Any, rows: Path) -> ActivationsStore:
    path = rows.parent / "cached"
    if not path.exists():
        activations = torch.randn(20, 24, 64, generator=torch.Generator().manual_seed(0)).tolist()
        features = Features({HOOKS[0]: Array2D((24, 64), "float32")})
        Dataset.from_dict({HOOKS[0]: activations}, features=features).save_to_disk(path)
    return _store(model, None, cached_activations_path=str(path))


@pytest.mark.filterwarnings("ignore:All samples")
@pytest.mark.parametrize("n_before", [1, 5, 90])
@pytest.mark.parametrize(
    "make",
    [
        _text_store(False),
        _text_store(True),
        _text_store(True, disable_concat_sequences=True, context_size=16),
        _text_store(False, activations_mixing_fraction=0.0),
        _text_store(False, exclude_special_tokens=torch.tensor([1, 2])),
        _tokenized_store,
        _file_store,
        pytest.param(_cached_store, marks=NEEDS_TORCH_FORMAT),
    ],
    ids=["map", "stream", "stream-no-concat", "unmixed", "special-tokens", "tokenized", "files", "cached"],
)
def test_after_a_checkpoint_the_same_batches_come(
    model: Any, rows: Path, tmp_path: Path, make: Callable[[Any, Path], ActivationsStore], n_before: int
):
    torch.manual_seed(5)
    uninterrupted = _take_over(make(model, rows))
    for _ in range(n_before):
        next(uninterrupted)
    uninterrupted.save_to_checkpoint(tmp_path)
    expected = [next(uninterrupted) for _ in range(90)]  # epochs later
    expected_random = torch.rand(3)

    torch.manual_seed(6)
    resumed = _take_over(make(model, rows))
    resumed.load_from_checkpoint(tmp_path)
    assert torch.equal(torch.rand(3), expected_random)
    for batch in expected[:30]:
        assert torch.equal(next(resumed), batch)
    for _ in range(2):  # and twice more, the second time before anything is read
        resumed.save_to_checkpoint(tmp_path)
        resumed = _take_over(make(model, rows))
        resumed.load_from_checkpoint(tmp_path)
    for batch in expected[30:]:
        assert torch.equal(next(resumed), batch)
    assert resumed.n_dataset_processed == uninterrupted.n_dataset_processed


@pytest.mark.filterwarnings("ignore:All samples")
@pytest.mark.parametrize("streaming", [False, True])
def test_several_hooks_after_a_checkpoint(model: Any, rows: Path, tmp_path: Path, streaming: bool):
    def start(seed: int) -> tuple[ResumableActivationsStore, Iterator[dict[str, Tensor]]]:
        torch.manual_seed(seed)
        store = _take_over(_multi_hook_store(model, _text(rows, streaming)))
        return store, store.get_multi_hook_data_loader()

    store, batches = start(7)
    for _ in range(9):
        next(batches)
    store.save_to_checkpoint(tmp_path)
    expected = [next(batches) for _ in range(30)]
    store, batches = start(8)
    store.load_from_checkpoint(tmp_path)
    for expected_batch in expected:
        batch = next(batches)
        assert all(torch.equal(batch[name], expected_batch[name]) for name in HOOKS)


@pytest.mark.filterwarnings("ignore:All samples")
def test_a_checkpoint_of_a_stream_serves_a_data_set_on_disk_and_the_other_way_round(
    model: Any, rows: Path, tmp_path: Path
):
    for before in (False, True):
        store = _take_over(_store(model, _text(rows, before)))
        for _ in range(5):
            next(store)
        store.save_to_checkpoint(tmp_path)
        expected = [next(store) for _ in range(20)]
        other = _take_over(_store(model, _text(rows, not before)))
        other.load_from_checkpoint(tmp_path)
        for batch in expected:
            assert torch.equal(next(other), batch)


def test_a_large_buffer_is_left_out_and_the_log_says_so(
    model: Any, rows: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    store = _take_over(_store(model, _text(rows, False)), max_buffer_bytes=1000)
    next(store)
    store.save_to_checkpoint(tmp_path)
    assert "more than the 0.00 GB that --max-buffer-gb allows" in caplog.text
    assert "not bit-equal" in caplog.text
    assert (tmp_path / "activations_store_state.safetensors").stat().st_size < 20_000
    caplog.clear()
    resumed = _take_over(_store(model, _text(rows, False)))
    resumed.load_from_checkpoint(tmp_path)
    assert "without its activation buffer" in caplog.text
    # it goes on behind the text that the buffer came from
    assert torch.equal(resumed.get_batch_tokens(), store.get_batch_tokens())
    assert next(resumed).shape == (40, 64)


def test_saelens_reads_our_checkpoints_and_we_read_its(
    model: Any, rows: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    ours = _take_over(_store(model, _text(rows, False)))
    for _ in range(20):
        next(ours)
    ours.save_to_checkpoint(tmp_path)
    theirs = _store(model, _text(rows, False))
    theirs.load_from_checkpoint(tmp_path)
    assert theirs.n_dataset_processed >= ours.n_dataset_processed > 0

    theirs.save_to_checkpoint(tmp_path)
    (tmp_path / "activations_store_position.json").unlink()
    resumed = _take_over(_store(model, _text(rows, False)))
    resumed.load_from_checkpoint(tmp_path)
    assert "was made without exact resuming" in caplog.text
    assert resumed.n_dataset_processed == theirs.n_dataset_processed


def test_activations_that_are_not_finite_are_one_sentence(model: Any, rows: Path, monkeypatch: pytest.MonkeyPatch):
    store = _take_over(_store(model, _text(rows, False)))
    next(store)
    parameter = next(p for name, p in model.named_parameters() if "layers.1" in name)
    original = parameter.detach().clone()
    try:
        with torch.no_grad():
            parameter.fill_(torch.nan)
        with pytest.raises(UserError, match=r"values that are not finite, of 4608, around row \d+ of the data set"):
            list(islice(store, 20))
    finally:
        with torch.no_grad():
            parameter.copy_(original)


@pytest.mark.parametrize("kind", [CheckedActivationsStore, ResumableActivationsStore])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": [*["Once upon a time, " * 9] * 20, None]}, "Row 21 of the data set holds null"),
        ({"tokens": [*[[5] * 24] * 20, [5] * 23]}, "Row 21 of the data set has 23 tokens, fewer than context_size=24"),
        ({"tokens": [*[[5] * 24] * 20, [600] * 24]}, "Row 21 .* the token id 600, but .* embeddings for 512 tokens"),
    ],
    ids=["null", "short", "outside"],
)
def test_a_row_that_only_reading_shows_to_be_unusable_is_named(
    model: Any, columns: dict[str, list[Any]], message: str, streaming: bool, kind: type[CheckedActivationsStore]
):
    dataset = Dataset.from_dict(columns)
    store = kind.take_over(_store(model, dataset.to_iterable_dataset() if streaming else dataset))
    with pytest.raises(UserError, match=message):
        list(islice(store, 30))


def test_positions_are_json_and_small(model: Any, rows: Path, tmp_path: Path):
    store = _take_over(_store(model, _text(rows, True)))
    next(store)
    store.save_to_checkpoint(tmp_path)
    position = json.loads((tmp_path / "activations_store_position.json").read_text())
    assert position["n_rows_read"] > 0
    assert position["dataset_state"] is not None
    assert len(json.dumps(position)) < 30_000
