"""Activation caches: what is in them, in which order it is read, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from datasets import Dataset, load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import ActivationsStore
from sae_lens.load_model import load_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sae_lens_matryoshka.activation_cache.batches import ShuffledBatches, held_out_batches
from sae_lens_matryoshka.activation_cache.cache import ActivationCache
from sae_lens_matryoshka.activation_cache.made_from import differences, made_from
from sae_lens_matryoshka.activation_cache.manifest import Manifest, write_manifest
from sae_lens_matryoshka.activation_cache.shards import write_shard
from sae_lens_matryoshka.errors import UserError
from sae_lens_matryoshka.run_files.building import build_runner_configs
from sae_lens_matryoshka.text.data_set import open_data_set
from sae_lens_matryoshka.training import caching
from sae_lens_matryoshka.training.caching import cache_activations
from sae_lens_matryoshka.training.options import CheckpointOptions
from sae_lens_matryoshka.training.run import train
from tests import processes
from tests.conftest import real_model
from tests.tiny_runs import tiny_multi_run, tiny_run, tiny_sae

SMALL: Any = {"tokens": 4000, "shard_bytes": 200_000}


@pytest.fixture(scope="module")
def cached(tinystories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of three shards, made by one run; tests that change it copy it."""
    return cache_activations(tiny_run(tinystories, None), tmp_path_factory.mktemp("cached") / "cache", **SMALL).folder


def _all_rows(cache: ActivationCache, hook: str) -> torch.Tensor:
    return cache.begin_reading([hook], torch.arange(cache.n_rows))()[hook]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"exclude_special_tokens": True},
        {"seqpos_slice": [3, None]},
        {"exclude_special_tokens": [403], "seqpos_slice": [0, 60, 2]},
    ],
    ids=str,
)
def test_rows_are_the_activations_that_saelens_would_train_on(
    tinystories: Path, tmp_path: Path, changes: dict[str, Any]
):
    run = tiny_run(tinystories, None, **changes)
    cache = ActivationCache(cache_activations(run, tmp_path / "cache", dtype="float32", **SMALL).folder)
    cfg: Any = build_runner_configs(run)
    model = load_model(cfg.model_class_name, cfg.model_name, device="cpu", hook_names=[cfg.hook_name])
    store = ActivationsStore.from_config(model, cfg, open_data_set(cfg))
    expected = torch.cat([store.get_filtered_llm_batch() for _ in range(-(-cache.n_rows // 64))])[: cache.n_rows]
    assert _all_rows(cache, "model.layers.2").equal(expected)
    assert len(cache.manifest.shards) > 2


def test_several_hooks_are_cached_in_one_pass(tinystories: Path, tmp_path: Path, cached: Path):
    cache = ActivationCache(cache_activations(tiny_multi_run(tinystories, None), tmp_path / "cache", **SMALL).folder)
    assert list(cache.manifest.d_in) == ["model.layers.1", "model.layers.2"]
    rows = _all_rows(cache, "model.layers.2")
    single = _all_rows(ActivationCache(cached), "model.layers.2")
    assert rows.equal(single[: len(rows)])
    assert not _all_rows(cache, "model.layers.1").equal(rows)


def test_a_row_leads_back_to_its_text(tinystories: Path, tmp_path: Path):
    run = tiny_run(tinystories, None, exclude_special_tokens=True, seqpos_slice=[2, None])
    cache = ActivationCache(cache_activations(run, tmp_path / "cache", dtype="float32", **SMALL).folder)
    model: Any = load_model("AutoModelForCausalLM", run["model_name"], device="cpu", hook_names=["model.layers.2"])
    rows = _all_rows(cache, "model.layers.2")
    for row in [0, 1, 700, 2222, cache.n_rows - 1]:
        tokens, position = cache.text_of(row)
        _, activations = model.run_with_cache(tokens[None].long(), names_filter=["model.layers.2"])
        torch.testing.assert_close(activations["model.layers.2"][0, position], rows[row], rtol=1e-4, atol=1e-4)
        assert cache.tokens()[row] == tokens[position]
    assert len(cache.tokens()) == cache.n_rows


def test_rows_of_a_real_model_are_its_hidden_states(tmp_path: Path):
    model_folder, text = real_model("gemma-3-270m"), tmp_path / "text.txt"
    text.write_text("The capital of France is Paris, and that of Italy is Rome.\n" * 40)
    run = {
        "model_name": str(model_folder),
        "model_class_name": "AutoModelForCausalLM",
        "model_from_pretrained_kwargs": {"dtype": "bfloat16"},
        "hook_name": "model.layers.9",
        "dataset_path": str(text),
        "is_dataset_tokenized": False,
        "streaming": False,
        "context_size": 32,
        "exclude_special_tokens": True,
        "store_batch_size_prompts": 4,
        "train_batch_size_tokens": 64,
        "n_batches_in_buffer": 8,
        "sae": tiny_sae(d_in=640),
        "training_tokens": 100,
        "device": "cpu",
    }
    cache = ActivationCache(cache_activations(run, tmp_path / "cache").folder)
    tokens = torch.stack([cache.text_of(row)[0] for row in range(cache.n_rows)]).unique_consecutive(dim=0).long()
    assert tokens.shape == (4, 32)
    assert tokens[:, 0].eq(2).all()
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)
    with torch.no_grad():
        hidden = model(tokens, output_hidden_states=True).hidden_states[10]
    assert _all_rows(cache, "model.layers.9").equal(hidden[tokens != 2])


def test_the_cache_ends_with_the_text(tinystories: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"Once upon a time {n} cats sat. " * 8}) + "\n" for n in range(40)))
    run = tiny_run(tinystories, None, dataset_path=str(text))
    with caplog.at_level("INFO", "sae_lens_matryoshka"):
        result = cache_activations(run, tmp_path / "cache", tokens=1_000_000)
    assert f"The text ends after {result.n_rows:,} activations" in caplog.text
    assert result.n_rows % 64 == 0
    assert cache_activations(run, tmp_path / "cache", tokens=2_000_000).was_finished


# the order of reading


def _made_cache(folder: Path, shard_rows: list[int], context_size: int = 8, d_in: int = 2) -> ActivationCache:
    """A cache whose row r is (r, -r)."""
    made: Any = {"hooks": {"hook": {"d_in": d_in, "hook_head_index": None}}, "context_size": context_size}
    folder.mkdir()
    records, begin = [], 0
    for number, n_rows in enumerate(shard_rows):
        values = torch.arange(begin, begin + n_rows).float()
        kept = torch.zeros(-(-n_rows // context_size), context_size, dtype=torch.bool)
        kept.view(-1)[:n_rows] = True
        path = folder / f"shard-{number:05d}.safetensors"
        records.append(write_shard(path, {"hook": torch.stack([values, -values], 1)}, torch.zeros(kept.shape), kept))
        begin += n_rows
    write_manifest(folder, Manifest(made, begin, 1, 1, "float32", tuple(records), finished=True))
    return ActivationCache(folder)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_every_row_is_read_once_an_epoch_and_those_held_out_never(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
):
    shard_rows = data.draw(st.lists(st.integers(1, 90), min_size=1, max_size=4).filter(lambda rows: sum(rows) >= 24))
    cache = _made_cache(tmp_path_factory.mktemp("caches") / "cache", shard_rows)
    batch_size = data.draw(st.integers(1, cache.n_training))
    seed = data.draw(st.integers(0, 3))
    held_out = torch.cat([batch[:, 0] for batch in held_out_batches(cache, "hook", 5, "cpu")]).long()
    assert len(held_out) == cache.n_held_out == len(set(held_out.tolist()))
    batches = ShuffledBatches(cache, ["hook"], batch_size, seed, "cpu")
    n_batches = -(-2 * cache.n_training // batch_size)
    read, positions = [], []
    for _ in range(n_batches):
        positions.append((batches.epoch, batches.n_read))
        batch = next(batches)["hook"]
        assert batch.shape == (batch_size, 2)
        assert batch[:, 0].equal(-batch[:, 1])
        read.append(batch[:, 0].long())
    # batches are sorted, and an epoch may end within one
    first_two = torch.cat(read)
    counts = torch.bincount(first_two, minlength=cache.n_rows)
    assert counts[held_out].sum() == 0
    trained_on = torch.ones(cache.n_rows, dtype=torch.bool)
    trained_on[held_out] = False
    assert counts[trained_on].min() >= 2 - (len(first_two) < 2 * cache.n_training)
    assert counts[trained_on].max() <= 3
    assert counts.sum() == n_batches * batch_size
    # from any position on it goes on with the same batches
    again = data.draw(st.integers(0, n_batches - 1))
    other = ShuffledBatches(cache, ["hook"], batch_size, seed, "cpu")
    other.go_to(*positions[again])
    for expected in read[again:]:
        assert next(other)["hook"][:, 0].long().equal(expected)


def test_epochs_and_seeds_have_orders_of_their_own(tmp_path: Path):
    cache = _made_cache(tmp_path / "cache", [400, 400])
    n_training = cache.n_training
    first, second = (
        [next(batches)["hook"][:, 0].tolist() for _ in range(4)]
        for batches in (ShuffledBatches(cache, ["hook"], n_training // 2, seed, "cpu") for seed in (0, 1))
    )
    assert sorted(first[0] + first[1]) == sorted(first[2] + first[3]) == sorted(second[0] + second[1])
    assert len({tuple(batch) for batch in (*first, *second)}) == 8
    # not a window of the text: a batch is drawn from all of it
    assert abs(sum(first[0]) / len(first[0]) - 400) < 40


def test_what_is_held_out_is_the_same_for_every_run_and_in_whole_blocks(tmp_path: Path):
    cache = _made_cache(tmp_path / "cache", [1000, 613])
    rows = cache.held_out_rows().view(-1, 8)
    assert rows.equal(ActivationCache(cache.folder).held_out_rows().view(-1, 8))
    assert (rows[:, :1] + torch.arange(8)).equal(rows)
    assert (rows[:, 0] % 8 == 0).all()
    assert len(rows) == round(0.05 * (1613 // 8))


# training


def test_training_loads_no_model_and_several_runs_share_a_cache(
    tinystories: Path, tmp_path: Path, cached: Path, monkeypatch: pytest.MonkeyPatch
):
    def no_model(*_: Any, **__: Any) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr("sae_lens.llm_sae_training_runner.load_model", no_model)
    monkeypatch.setattr("sae_lens.multi_sae_training_runner.load_model", no_model)
    one = train(tiny_run(tinystories, None), output=tmp_path / "one", activations=cached).saes[0]
    other_sae = tiny_sae(architecture="matryoshka_topk", normalize_activations="covariance_whitening")
    del other_sae["use_matryoshka_aux_loss"]
    other = train(tiny_run(tinystories, None, sae=other_sae), output=tmp_path / "other", activations=cached).saes[0]
    saes = {"a": tiny_sae(k=4), "b": tiny_sae(normalize_activations="expected_average_only_in")}
    multi = tiny_multi_run(tinystories, None, hook_names="model.layers.2", saes=saes)
    several = train(multi, output=tmp_path / "several", activations=cached).saes
    for sae in (one, other, *several):
        assert sae.incomplete is None
        assert sae.levels[-1].n_samples == ActivationCache(cached).n_held_out
        assert sae.levels[-1].fvu < 0.6
    recorded = json.loads((tmp_path / "several" / "runner_cfg.json").read_text())
    assert (recorded["use_cached_activations"], recorded["cached_activations_path"]) == (True, str(cached))


def test_a_run_file_names_a_cache_itself_and_is_finished_then(tinystories: Path, tmp_path: Path, cached: Path):
    run = tiny_run(
        tinystories, tmp_path / "checkpoints", use_cached_activations=True, cached_activations_path=str(cached)
    )
    train(run, output=tmp_path / "out")
    assert train(run, output=tmp_path / "out", resume="auto").was_finished
    assert train(run, output=tmp_path / "out", resume="auto", activations=cached).was_finished
    with pytest.raises(FileExistsError, match="other settings of use_cached_activations"):
        train(tiny_run(tinystories, tmp_path / "checkpoints"), output=tmp_path / "out", resume="auto")


def test_training_on_from_an_sae_works_from_a_cache(tinystories: Path, tmp_path: Path, cached: Path):
    run = tiny_run(tinystories, None)
    first = train(run, output=tmp_path / "first", activations=cached)
    run["from_pretrained_path"] = str(first.output)
    second = train({**run, "lr": 1e-9}, output=tmp_path / "second", activations=cached)
    assert second.saes[0].levels[-1].fvu == pytest.approx(first.saes[0].levels[-1].fvu, rel=0.05)


# what is refused


def _cut_off(cache: Path) -> None:
    shard = cache / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])


def _change_a_byte(cache: Path) -> None:
    shard = cache / "shard-00001.safetensors"
    contents = bytearray(shard.read_bytes())
    contents[-100_000] ^= 1
    shard.write_bytes(contents)


def _other_type(cache: Path) -> None:
    _rewrite(
        cache,
        lambda tensors: {n: t.view(torch.float16) if t.dtype == torch.bfloat16 else t for n, t in tensors.items()},
    )


def _rewrite(cache: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    shard = cache / "shard-00001.safetensors"
    save_file(change({name: tensor.clone() for name, tensor in load_file(shard).items()}), shard)


def _edit_manifest(**changes: Any) -> Callable[[Path], None]:
    def edit(cache: Path) -> None:
        path = cache / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (_cut_off, r"shard-00001\.safetensors has [\d,]+ bytes, not [\d,]+: it is cut off"),
        (_change_a_byte, r"the contents of .*shard-00001\.safetensors have changed"),
        (_other_type, r"shard-00001\.safetensors holds \('F16', .* as model.layers.2, not \('BF16'"),
        (lambda cache: (cache / "shard-00001.safetensors").unlink(), r"shard-00001\.safetensors is missing"),
        (_edit_manifest(finished=False), r"is unfinished, with 4,\d+ of 4,000 activations; the command .* --output"),
        (_edit_manifest(format="other 2"), "is of the format 'other 2'"),
        (_edit_manifest(shards=[{"n_rows": -1}]), "manifest.json cannot be read"),
        (_edit_manifest(dtype="int8"), "manifest.json cannot be read"),
        (lambda cache: (cache / "manifest.json").unlink(), "has no manifest.json; make an activation cache"),
    ],
    ids=["cut off", "changed", "type", "missing", "unfinished", "format", "manifest", "dtype", "no manifest"],
)
def test_damaged_and_unfinished_caches_are_refused(
    tinystories: Path, tmp_path: Path, cached: Path, damage: Callable[[Path], Any], expected: str
):
    cache = shutil.copytree(cached, tmp_path / "cache")
    damage(cache)
    with pytest.raises(UserError, match=expected):
        train(tiny_run(tinystories, None), output=tmp_path / "out", activations=cache)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"hook_name": "model.layers.3"}, "hook 'model.layers.3', which is not among model.layers.2"),
        ({"context_size": 32}, "context_size=32, not 64"),
        ({"exclude_special_tokens": True}, "exclude_special_tokens=True, not False"),
        ({"prepend_bos": False}, "prepend_bos=False, not True"),
        ({"seqpos_slice": [1, None]}, r"seqpos_slice=\[1, None\], not \[None\]"),
        ({"autocast_lm": True}, "autocast_lm=True, not False"),
        ({"model_from_pretrained_kwargs": {"dtype": "bfloat16"}}, "model_from_pretrained_kwargs={'dtype': 'bfloat16'"),
        ({"sae": tiny_sae(d_in=32)}, "d_in=32 at model.layers.2, not 64"),
        (
            {"train_batch_size_tokens": 3900, "n_batches_in_buffer": 99, "training_tokens": 200_000},
            "fewer than train_batch_size_tokens=3900",
        ),
    ],
    ids=str,
)
def test_runs_with_other_activations_are_refused_before_a_model_is_loaded(
    tinystories: Path, tmp_path: Path, cached: Path, changes: dict[str, Any], expected: str
):
    with pytest.raises(UserError, match=expected):
        train(tiny_run(tinystories, None, **changes), output=tmp_path / "out", activations=cached)


def test_model_and_text_go_by_their_contents(tinystories: Path, tmp_path: Path, cached: Path):
    model, text = shutil.copytree(tinystories / "model", tmp_path / "model"), tmp_path / "data"
    shutil.copytree(tinystories / "data", text)
    run = tiny_run(tinystories, None, model_name=str(model), dataset_path=str(text))
    ActivationCache(cached).check_serves(build_runner_configs(run))  # type: ignore[arg-type]
    [weights] = model.glob("*.safetensors")
    tensors = {name: tensor.clone() for name, tensor in load_file(weights).items()}
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(UserError, match=r"model_name='.*' has other contents than"):
        train(run, output=tmp_path / "out", activations=cached)
    names = [{"dtype": "bfloat16"}, {"torch_dtype": "bfloat16"}, {"torch_dtype": torch.bfloat16}]
    cfgs: Any = [build_runner_configs({**run, "model_from_pretrained_kwargs": kwargs}) for kwargs in names]
    assert not differences(made_from(cfgs[0]), made_from(cfgs[1]))
    assert not differences(made_from(cfgs[0]), made_from(cfgs[2]))
    (text / "more.jsonl").write_text('{"text": "more"}\n')
    differ = made_from(build_runner_configs(run))["dataset_content"]  # type: ignore[arg-type]
    assert differ != ActivationCache(cached).manifest.made_from["dataset_content"]


def _write_text(file: Path, text: str) -> None:
    if file.suffix == ".arrow":
        table = pa.table({"text": [text]})
        with pa.OSFile(str(file), "wb") as out, pa.ipc.new_stream(out, table.schema) as writer:
            writer.write_table(table)
    else:
        file.write_text(f"{json.dumps({'text': text})}\n" if file.suffix == ".jsonl" else f"{text}\n")


@pytest.mark.parametrize(
    "name",
    ["cache-stories.jsonl", "cache-stories.arrow", "below/cache-stories.txt", ".stories.jsonl", ".cache/stories.jsonl"],
)
def test_a_text_that_is_read_counts_whatever_its_name(tinystories: Path, tmp_path: Path, name: str):
    file = tmp_path / "data" / name
    file.parent.mkdir(parents=True)
    cfg: Any = build_runner_configs(tiny_run(tinystories, None, dataset_path=str(tmp_path / "data"), streaming=True))
    _write_text(tmp_path / "data" / f"stories{file.suffix}", "Once upon a time.")
    before = made_from(cfg)
    _write_text(file, "A cat.")
    dataset: Any = open_data_set(cfg)
    is_read = "A cat." in [row["text"] for row in dataset]
    assert is_read != name.startswith(".")
    assert (made_from(cfg) != before) == is_read


def test_what_the_package_datasets_leaves_does_not_count(tinystories: Path, tmp_path: Path):
    folder = tmp_path / "saved"
    Dataset.from_dict({"text": ["Once upon a time."]}).save_to_disk(folder)
    cfg: Any = build_runner_configs(tiny_run(tinystories, None, dataset_path=str(folder)))
    before = made_from(cfg)
    load_from_disk(folder).map(lambda row: {"text": row["text"] * 2})
    assert list(folder.glob("cache-*.arrow"))
    (folder / "stories.lock").touch()
    assert made_from(cfg) == before


def test_code_that_comes_with_a_model_counts(tinystories: Path, tmp_path: Path):
    cfg: Any = build_runner_configs(tiny_run(tinystories, None, model_name=str(tmp_path)))
    before = made_from(cfg)
    (tmp_path / "modeling_ours.py").write_text("scale = 2\n")
    assert made_from(cfg) != before


@pytest.mark.parametrize("name", ["data", "data/deep/cache", "model", "model/cache", "."])
def test_no_cache_is_written_into_what_it_is_made_of(tinystories: Path, tmp_path: Path, name: str):
    inputs = tmp_path / "inputs"
    for source in ("data", "model"):
        shutil.copytree(tinystories / source, inputs / source)
    (tmp_path / "link").symlink_to(inputs)
    run = tiny_run(tinystories, None, model_name=str(inputs / "model"), dataset_path=str(inputs / "data"))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"(dataset_path|model_name)='.*' lie one in the other, .*; choose a folder"):
        cache_activations(run, tmp_path / "link" / name)
    assert sorted(tmp_path.rglob("*")) == before
    assert cache_activations(run, inputs / "cache", tokens=100).n_rows


@pytest.mark.parametrize("field", ["output_path", "checkpoint_path"])
@pytest.mark.parametrize("source", ["data", "model"])
def test_no_run_writes_into_what_it_reads(tinystories: Path, tmp_path: Path, field: str, source: str):
    for name in ("data", "model"):
        shutil.copytree(tinystories / name, tmp_path / name)
    run = tiny_run(tinystories, None, model_name=str(tmp_path / "model"), dataset_path=str(tmp_path / "data"))
    run |= {"output_path": str(tmp_path / "out"), field: str(tmp_path / source / "sae")}
    before = sorted(tmp_path.rglob("*"))
    option = "--output" if field == "output_path" else field
    with pytest.raises(
        UserError, match=rf"/{source}/sae(/\w+)? and .* lie one in the other, .* beside it with {option}"
    ):
        train(run)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("changes", [{}, {"seqpos_slice": [0, 60, 20]}], ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_room_that_is_asked_for_is_what_is_taken(
    tinystories: Path, tmp_path: Path, dtype: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    asked: list[int] = []
    monkeypatch.setattr(caching, "_check_room", lambda _, n_bytes: asked.append(n_bytes))
    run = tiny_run(tinystories, None, n_batches_in_buffer=99, **changes)
    folder = cache_activations(run, tmp_path / "cache", tokens=1000, dtype=dtype).folder
    taken = sum(path.stat().st_size for path in folder.iterdir())
    assert taken < asked[0] < taken + 150_000


def test_a_shard_that_is_cut_off_while_it_is_read_is_one_sentence(tmp_path: Path, cached: Path):
    cache = shutil.copytree(cached, tmp_path / "cache")
    program = f"""
import os
from pathlib import Path
import torch
from sae_lens_matryoshka.activation_cache.cache import ActivationCache
from sae_lens_matryoshka.errors import UserError

cache = ActivationCache(Path({str(cache)!r}))
read = lambda: cache.begin_reading(["model.layers.2"], torch.arange(cache.n_rows))()
read()
os.truncate(cache.folder / "shard-00001.safetensors", 1000)
for again in (read, lambda: cache.text_of(cache.n_rows // 2)):
    try:
        again()
    except UserError as error:
        print(error)
"""
    done = processes.run(program, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("shard-00001.safetensors has been cut off to 1,000 bytes of") == 2


def test_options_that_a_cache_does_not_use_are_refused(tinystories: Path, tmp_path: Path, cached: Path):
    run, out = tiny_run(tinystories, None), tmp_path / "out"
    for options in (CheckpointOptions(exact=False), CheckpointOptions(max_buffer_bytes=5)):
        with pytest.raises(UserError, match="--no-exact-resume and --max-buffer-gb"):
            train(run, output=out, activations=cached, checkpointing=options)
    for samples in ({"measure_samples": 3000}, {"calibration_samples": 3000}):
        with pytest.raises(UserError, match=r"samples 3000 is above the \d+ activations that .* holds out"):
            train(run, output=out, activations=cached, **samples)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="is no folder"):
        train(run, output=out, activations=tmp_path / "nothing")
    (tmp_path / "saelens").mkdir()
    (tmp_path / "saelens" / "dataset_info.json").write_text("{}")
    with pytest.raises(UserError, match="SAELens takes its own for a single SAE only"):
        train(tiny_multi_run(tinystories, None), output=out, activations=tmp_path / "saelens")
    with pytest.raises(UserError, match="leave one of them out"):
        train({**run, "use_cached_activations": True, "cached_activations_path": "x"}, output=out, activations=cached)
    synthetic = {
        "synthetic_model": {"num_features": 8, "hidden_dim": 4},
        "training_samples": 5000,
        "sae": tiny_sae(d_in=4),
    }
    with pytest.raises(UserError, match="--activations is for runs on a language model"):
        train(synthetic, output=out, activations=cached)


@pytest.mark.parametrize(
    ("changes", "options", "expected"),
    [
        ({"context_size": 32}, {}, "context_size=32, not 64"),
        ({}, {"dtype": "float32"}, "--dtype float32, not bfloat16"),
        ({}, {"tokens": 5000}, r"5,000 activations, not 4,0\d\d"),
        ({"hook_name": "model.layers.1"}, {}, "hook 'model.layers.1', which is not among"),
    ],
    ids=str,
)
def test_another_runs_cache_is_not_touched(
    tinystories: Path, cached: Path, changes: dict[str, Any], options: dict[str, Any], expected: str
):
    before = {path: path.stat().st_mtime_ns for path in cached.iterdir()}
    with pytest.raises(UserError, match=expected):
        cache_activations(tiny_run(tinystories, None, **changes), cached, **{**SMALL, **options})
    n_rows = ActivationCache(cached).n_rows
    assert n_rows > SMALL["tokens"]
    for tokens in (3000, n_rows):
        assert cache_activations(tiny_run(tinystories, None), cached, tokens=tokens).was_finished
    assert {path: path.stat().st_mtime_ns for path in cached.iterdir()} == before


def test_what_cannot_be_cached_is_one_sentence(
    tinystories: Path, tmp_path: Path, cached: Path, monkeypatch: pytest.MonkeyPatch
):
    run = tiny_run(tinystories, None)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and no activation cache"):
        cache_activations(run, tmp_path / "notes")
    with pytest.raises(UserError, match=r"would take 1\.33PB, but [\d.]+[MGT]B are free"):
        cache_activations(run, tmp_path / "huge", tokens=10**13)
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(UserError, match="circle cannot be used"):
        cache_activations(run, tmp_path / "circle")
    with pytest.raises(UserError, match="--dtype 'int8' must be one of"):
        cache_activations(run, tmp_path / "int8", dtype="int8")
    with pytest.raises(UserError, match="leaves out all of the"):
        cache_activations({**run, "exclude_special_tokens": list(range(512))}, tmp_path / "none")
    # which does not stand in the way of the run as it was meant
    assert cache_activations(run, tmp_path / "none", tokens=500).n_rows >= 500
    damaged = shutil.copytree(cached, tmp_path / "damaged")
    _change_a_byte(damaged)
    with pytest.raises(UserError, match="have changed"):
        cache_activations(run, damaged, **SMALL)
