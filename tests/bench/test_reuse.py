"""Results and cache entries are reused only where everything that could change them is the same, by content."""

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sae_lens import SAE
from safetensors.torch import load_file, save_file
from torch import nn

from sae_lens_matryoshka import MatryoshkaSAE, MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig
from sae_lens_matryoshka.bench import evaluate, fingerprints
from sae_lens_matryoshka.bench.absorption import Absorption
from sae_lens_matryoshka.bench.activation_source import ActivationSource, TextSpec
from sae_lens_matryoshka.bench.cache import Cache
from sae_lens_matryoshka.bench.concept_erasure import ConceptErasure
from sae_lens_matryoshka.bench.core import Core
from sae_lens_matryoshka.bench.evaluated_saes import Hook, SAEView, levels, on_device
from sae_lens_matryoshka.bench.fingerprints import model_hash, path_hash, tokenizer_hash
from sae_lens_matryoshka.bench.labelled_text import LabelledText
from sae_lens_matryoshka.bench.meta_structure import MetaStructure
from sae_lens_matryoshka.bench.models import Model, load_model
from sae_lens_matryoshka.bench.results import load_results
from sae_lens_matryoshka.bench.sparse_probing import SparseProbing
from sae_lens_matryoshka.bench.upstream import (
    AbsorptionEvalConfig,
    CoreEvalConfig,
    MetaStructureEvalConfig,
    ScrAndTppEvalConfig,
)
from sae_lens_matryoshka.errors import UserError
from sae_lens_matryoshka.hub.saved_saes import find_saved_saes
from sae_lens_matryoshka.hub.upload_plan import plan_upload
from sae_lens_matryoshka.saes.loading import load_any
from sae_lens_matryoshka.saved.fingerprints import module_hash
from sae_lens_matryoshka.untrusted.csv_tables import read_csv

HOOK = Hook("blocks.2.hook_resid_post", 2)
TEXTS = {"a": ["Once upon a time", "Tom ran home."], "b": ["She saw a cat.", "The end"]}


@pytest.fixture
def own_model(tinystories: Path) -> Model:
    """A model that a test may change."""
    return load_model(tinystories / "model")


@given(
    shape=st.sampled_from([(4096, 3), (3, 8192), (12288,), (5, 7), ()]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64]),
    place=st.integers(0, 10**6),
)
@settings(max_examples=60, deadline=None)
def test_one_value_anywhere_makes_another_module(shape: tuple[int, ...], dtype: torch.dtype, place: int):
    module = nn.Module()
    module.register_buffer("values", torch.arange(max(1, torch.Size(shape).numel())).reshape(shape).to(dtype))
    other = copy.deepcopy(module)
    assert module_hash(module) == module_hash(other)
    flat = other.get_buffer("values").view(-1)
    flat[place % len(flat)] += 1 if dtype == torch.int64 else flat[place % len(flat)].abs() + 1
    assert module_hash(module) != module_hash(other)


def test_shapes_and_types_are_part_of_a_module():
    names = set()
    for tensor in (torch.zeros(6), torch.zeros(2, 3), torch.zeros(6, dtype=torch.int32), torch.zeros(12).bfloat16()):
        module = nn.Module()
        module.register_buffer("values", tensor)
        names.add(module_hash(module))
    assert len(names) == 4


def test_a_model_is_the_same_wherever_it_lies_and_another_with_other_settings(tinystories: Path, tmp_path: Path):
    shutil.copytree(tinystories / "model", tmp_path / "elsewhere")
    here, elsewhere = load_model(tinystories / "model"), load_model(tmp_path / "elsewhere")
    list(map(here.to_tokens, ["some text", "some more"]))  # leaves traces in a fast tokenizer
    assert model_hash(here) == model_hash(elsewhere)
    assert tokenizer_hash(here.tokenizer) == tokenizer_hash(elsewhere.tokenizer)
    config = json.loads((tmp_path / "elsewhere" / "config.json").read_text())
    (tmp_path / "elsewhere" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert model_hash(here) != model_hash(load_model(tmp_path / "elsewhere"))


def _change_weight(module: nn.Module, place: int) -> None:
    parameters = list(module.parameters())
    flat = parameters[place % len(parameters)].data.view(-1)
    flat[place % len(flat)] += 0.5


CHANGES: dict[str, Callable[[Any, int], None]] = {
    "a weight of the model": lambda world, place: _change_weight(world.model, place),
    "a weight of the SAE": lambda world, place: _change_weight(world.sae, place),
    "a setting of the SAE": lambda world, place: setattr(world.sae.cfg, "apply_b_dec_to_input", False),
    "the tokenizer": lambda world, place: world.model.tokenizer.add_tokens([f"upon{place}"]),
    "its BOS": lambda world, place: setattr(world.model.tokenizer, "bos_token", "</s>"),
    "a byte of a text": lambda world, place: world.texts["a"].__setitem__(place % 2, "Once upon a dime"),
    "the hook": lambda world, place: setattr(world, "hook", Hook("blocks.1.hook_resid_post", 1)),
    "the context": lambda world, place: setattr(world, "context", 5),
    "the version of a package": lambda world, place: world.patch.setattr(
        fingerprints, "version", lambda name: f"{place}"
    ),
}


class _World:
    """Everything that mean latents are made from."""

    def __init__(self, model: Model, sae: MatryoshkaSAE, cache: Cache, patch: pytest.MonkeyPatch) -> None:
        self.model, self.sae, self.patch = model, sae, patch
        self.texts = copy.deepcopy(TEXTS)
        self.hook, self.context = HOOK, 8
        self.source = ActivationSource(model, cache)

    def pooled(self) -> bool:
        """Whether the mean latents were made anew."""
        calls: list[int] = []
        encode = self.sae.encode
        fingerprints.package_versions.cache_clear()
        self.source.look_again()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.sae, "encode", lambda *a, **o: calls.append(0) or encode(*a, **o))
            spec = TextSpec(self.texts, self.texts, self.hook, self.context, batch_size=2)
            self.source.pooled_latents(spec, SAEView(self.sae, self.hook, "model"), None)
        return bool(calls)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(what=st.sampled_from(list(CHANGES)), place=st.integers(0, 10**7))
def test_whatever_changes_the_latents_are_made_again(what: str, place: int, own_model: Model, sae: MatryoshkaSAE):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(own_model, "tokenizer", copy.deepcopy(own_model.tokenizer))
        patch.setattr(sae, "cfg", copy.deepcopy(sae.cfg))
        world = _World(own_model, sae, Cache(), patch)
        world.pooled()
        assert not world.pooled(), "made again for nothing"
        CHANGES[what](world, place)
        assert world.pooled(), f"{what} was changed, and nothing made again"
    fingerprints.package_versions.cache_clear()


def _core(text: Path) -> Core:
    return Core(CoreEvalConfig(dataset=str(text), context_size=32, batch_size_prompts=2,
                               n_eval_reconstruction_batches=1, n_eval_sparsity_variance_batches=1))  # fmt: skip


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("model", "was made with another model"),
        ("tokenizer", "was made with another tokenizer"),
        ("hook", r"was made with the hook blocks.2.hook_resid_post, now blocks.1.hook_resid_post"),
        ("text", "was made with other text"),
        ("sae", "was made with other parameters of the SAE"),
        ("version", r"was made with sae-bench 0\.6\.0, now 9"),
    ],
)
def test_a_finished_result_is_refused_where_something_else_was_meant(
    what: str, message: str, own_model: Model, sae: MatryoshkaSAE, tinystories: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    text = tmp_path / "text"
    text.mkdir()
    lines = (tinystories / "data" / "validation.jsonl").read_text().splitlines()[:40]
    (text / "data.jsonl").write_text("\n".join(lines))
    source, core, hook = ActivationSource(own_model), _core(text), None
    saes = levels("ours", sae, [0])
    (path,) = core.run(saes, source, tmp_path / "out")
    first = path.read_text()
    core.run(saes, source, tmp_path / "out")
    assert path.read_text() == first
    if what == "model":
        own_model.W_U.data[3, 5] += 1  # type: ignore[index] # of which no activation at the hook knows
    elif what == "tokenizer":
        own_model.tokenizer.add_tokens(["Tom"])  # type: ignore[union-attr]
    elif what == "hook":
        hook = "blocks.1.hook_resid_post"
    elif what == "text":
        (text / "data.jsonl").write_text("\n".join([lines[0].replace("the", "teh"), *lines[1:]]))
    elif what == "sae":
        sae.W_dec.data[0, 0] += 1
    else:
        versions = fingerprints.package_versions() | {"sae-bench": "9"}
        monkeypatch.setattr("sae_lens_matryoshka.bench.evaluation.package_versions", lambda: versions)
    with pytest.raises(UserError, match=message):
        core.run(saes, source, tmp_path / "out", hook)
    assert path.read_text() == first
    core.run(saes, source, tmp_path / "out", hook, force=True)
    assert path.read_text() != first


def test_an_evaluation_that_is_used_again_is_about_the_new_model(sae: MatryoshkaSAE, model: Model, tmp_path: Path):
    evaluation = Absorption(AbsorptionEvalConfig())
    first, second = ActivationSource(model), ActivationSource(model)
    first.name, second.name = "first", "pythia-70m-deduped"
    evaluation.begin(first)
    assert evaluation.config.model_name == "first"
    evaluation._prompts[HOOK] = None  # type: ignore[assignment]
    evaluation.begin(second)
    assert evaluation.config.model_name == "pythia-70m-deduped"
    assert evaluation._prompts == {}
    probing = SparseProbing()
    for source, batch_size in ((first, 32), (second, 512), (first, 32)):
        probing.begin(source)
        assert probing.config.llm_batch_size == batch_size


def test_an_sae_whose_latents_were_ablated_is_another_within_one_source(model: Model, tmp_path: Path):
    """At a width of a multiple of 4,096, samples of every tensor fell on the same columns."""
    torch.manual_seed(0)
    cfg = {"architecture": "standard", "d_in": 64, "d_sae": 4096, "metadata": {"hook_name": HOOK.name}}
    sae = SAE.from_dict(cfg)
    source = ActivationSource(model, Cache(tmp_path))
    spec = TextSpec(TEXTS, TEXTS, HOOK, 8, batch_size=2)
    before = source.pooled_latents(spec, SAEView(sae, HOOK, "model"), None).of_texts.train["a"]
    with torch.no_grad():
        sae.W_enc[:, 1::2] = 0
    after = source.pooled_latents(spec, SAEView(sae, HOOK, "model"), None).of_texts.train["a"]
    assert before[:, 1::2].any()
    assert not after[:, 1::2].any()


def test_after_a_refusal_neither_table_nor_csv_shows_what_was_refused(
    model: Model, sae: MatryoshkaSAE, tinystories: Path, tmp_path: Path
):
    core = _core(tinystories / "data")
    meta = MetaStructure(MetaStructureEvalConfig(train_steps=2, autocast=False))
    saes = levels("ours", sae, [0, 1])
    first = evaluate(saes, model, tmp_path, [core, meta])
    assert set(first.results["evaluation"]) == {"core", "meta_structure"}
    sae.W_dec.data[20, 0] += 1  # of the second level only
    report = evaluate(saes, model, tmp_path, [core])
    assert "was made with other parameters" in report.failures["core"]
    kept = report.results[report.results["evaluation"] == "core"]
    assert set(kept["level"]) <= {0}
    (tmp_path / "core" / "ours_level_0_eval_results.json").write_text("")
    (tmp_path / "core" / "other_level_0_eval_results.json").write_text('{"a": 1}')
    report = evaluate(saes[:1], model, tmp_path, [core])
    assert any("could not be read" in sentence and "is made again" in sentence for sentence in report.skipped)
    assert any("other_level_0" in sentence and "passed over" in sentence for sentence in report.skipped)
    assert not report.failures
    with pytest.warns(UserWarning, match="other_level_0"):
        assert set(load_results(tmp_path)["sae"]) == {"ours"}


def test_a_folder_is_named_by_all_that_is_in_it(tmp_path: Path):
    (tmp_path / "a").write_text("x")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c").write_text("y")
    names = [path_hash(tmp_path)]
    (tmp_path / "b" / "c").write_text("z")
    names.append(path_hash(tmp_path))
    (tmp_path / "b" / "c").rename(tmp_path / "b" / "d")
    names.append(path_hash(tmp_path))
    assert len(set(names)) == 3


def test_when_all_is_refused_no_table_or_figure_of_before_is_left(
    model: Model, sae: MatryoshkaSAE, tinystories: Path, tmp_path: Path
):
    evaluate(levels("ours", sae, [0]), model, tmp_path, [_core(tinystories / "data")])
    assert (tmp_path / "results.csv").is_file()
    sae.b_dec.data[0] += 1
    assert evaluate(levels("ours", sae, [0]), model, tmp_path, [_core(tinystories / "data")]).results.empty
    assert [path.name for path in tmp_path.iterdir()] == ["core"]


@pytest.mark.parametrize("field", ["prepend_bos", "exclude_special_tokens"])
def test_what_core_reads_of_an_saes_metadata_is_part_of_its_result(
    field: str, model: Model, sae: MatryoshkaSAE, tinystories: Path, tmp_path: Path
):
    core, saes = _core(tinystories / "data"), levels("ours", sae, [0])
    sae.cfg.metadata.exclude_special_tokens = [1]
    core.run(saes, model, tmp_path)
    core.run(levels("ours", sae, [0]), model, tmp_path)
    setattr(sae.cfg.metadata, field, {"prepend_bos": False, "exclude_special_tokens": [1, 300]}[field])
    with pytest.raises(UserError, match="was made with other text"):
        core.run(levels("ours", sae, [0]), model, tmp_path)


def _write_text(path: Path, tinystories: Path, first: int) -> Path:
    lines = (tinystories / "data" / "validation.jsonl").read_text().splitlines()
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines[first : first + 40]) + "\n")
    return path


def test_numbers_of_other_weights_never_stand_beside_new_ones(
    model: Model, sae: MatryoshkaSAE, tinystories: Path, tmp_path: Path
):
    core, meta = _core(tinystories / "data"), MetaStructure(MetaStructureEvalConfig(train_steps=2, autocast=False))
    evaluate(levels("ours", sae), model, tmp_path, [core])
    evaluate(levels("theirs", copy.deepcopy(sae)), model, tmp_path, [core])
    sae.W_dec.data[0, 0] += 1  # of every level
    report = evaluate(levels("ours", sae, [0]), model, tmp_path, [core], force=True)
    shown = report.results[report.results["sae"] == "ours"]
    assert set(shown["level"]) == {0}
    assert set(report.results["sae"]) == {"ours", "theirs"}
    (sentence,) = report.skipped
    assert sentence.startswith(
        "core of ours (levels 1, 2) is left out of table and figures: it was made with other param"
    )
    assert len(read_csv(tmp_path / "results.csv")) == len(report.results)

    report = evaluate(levels("ours", sae, [1]), model, tmp_path, [meta])
    shown = report.results[report.results["sae"] == "ours"]
    assert set(zip(shown["evaluation"], shown["level"], strict=True)) == {("core", 0), ("meta_structure", 1)}
    report = evaluate(levels("theirs", copy.deepcopy(sae), [0]), model, tmp_path, [meta])
    assert "core of theirs (levels 0, 1, 2) is left out" in " ".join(report.skipped)
    assert "core of ours (levels 1, 2) is left out" in " ".join(report.skipped)  # which nobody evaluates now
    assert set(report.results.loc[report.results["evaluation"] == "core", "level"]) == {0}


@pytest.mark.parametrize(
    ("what", "message", "is_core_run_again"),
    [
        ("text", "other text", True),
        ("text", "other text", False),
        ("hook", "the hook blocks.2.hook_resid_post, now blocks.1.hook_resid_post", True),
        ("context", "context_size=32, now 16", True),
        ("context", "context_size=32, now 16", False),
        ("model", "another model", True),
        ("model", "another model", False),
    ],
)
def test_results_of_other_settings_are_not_put_side_by_side(
    what: str, message: str, is_core_run_again: bool, own_model: Model, sae: MatryoshkaSAE, tinystories: Path,
    tmp_path: Path,
):  # fmt: skip
    text = _write_text(tmp_path / "text.jsonl", tinystories, 0)
    other = _write_text(tmp_path / "other.jsonl", tinystories, 40)
    meta = MetaStructure(MetaStructureEvalConfig(train_steps=2, autocast=False))
    evaluate(levels("first", sae, [0]), own_model, tmp_path / "out", [_core(text), meta])
    core = _core(other if what == "text" else text)
    if what == "context":
        core = Core(dataclasses.replace(core.config, context_size=16))
    if what == "model":
        own_model.W_U.data[3, 5] += 1  # type: ignore[index]
    hook = "blocks.1.hook_resid_post" if what == "hook" else None
    report = evaluate(levels("second", sae, [0]), own_model, tmp_path / "out", [core], hook_name=hook)
    if not is_core_run_again:  # what is newest says what the rest must have been made with
        report = evaluate(levels("second", sae, [0]), own_model, tmp_path / "out", [meta], hook_name=hook)
    of_core = report.results[report.results["evaluation"] == "core"]
    assert set(of_core["sae"]) == {"second"}
    assert set(report.results.loc[report.results["evaluation"] == "meta_structure", "sae"]) >= {"first"}
    (sentence,) = report.skipped
    assert sentence == (
        f"core of first (level 0) is left out of table and figures: it was made with {message}; make it again with "
        "--force, or choose another --output."
    )
    if what != "hook":  # an SAE of another layer may stand beside it
        with pytest.warns(UserWarning, match="core of first .level 0. is not comparable to the newest results: it was"):
            assert set(load_results(tmp_path / "out")["sae"]) == {"first", "second"}


def test_levels_and_ways_of_training_are_no_other_settings(
    model: Model, sae: MatryoshkaSAE, tinystories: Path, snippets: dict[str, list[str]], tmp_path: Path
):
    """Fewer latents can be ablated in a narrow level, and what an SAE was trained without is left out for it alone."""
    split = {label: texts[:10] for label, texts in snippets.items()}
    config = ScrAndTppEvalConfig(
        perform_scr=False, dataset_names=["kinds"], n_values=[2, 20], train_set_size=20, test_set_size=10,
        context_length=8, probe_epochs=1,
    )  # fmt: skip
    tpp = ConceptErasure(config, [LabelledText("kinds", split, split)])
    other = copy.deepcopy(sae)
    other.cfg.metadata.exclude_special_tokens = True
    for saes in (levels("ours", sae, [0]), levels("theirs", other, [2])):
        report = evaluate(saes, model, tmp_path, [tpp, _core(tinystories / "data")])
        assert not report.skipped
    assert set(report.results["sae"]) == {"ours", "theirs"}
    report = evaluate(levels("ours", sae, [1]), model, tmp_path, [tpp])
    assert not report.skipped


def test_the_same_under_another_path_is_found_finished(
    model: Model, sae: MatryoshkaSAE, tinystories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    text = _write_text(tmp_path / "text.jsonl", tinystories, 0)
    shutil.copytree(tinystories / "model", tmp_path / "another name")
    monkeypatch.chdir(tmp_path)
    (path,) = _core(text).run(levels("ours", sae, [0]), model, "out")
    first = path.read_text()
    shutil.copy(text, tmp_path / "copy.jsonl")
    for where in (Path("text.jsonl"), Path("copy.jsonl")):
        assert _core(where).run(levels("ours", sae, [0]), tmp_path / "another name", "out")
        assert path.read_text() == first


def test_files_that_evaluate_has_not_written_are_refused_and_stay(
    model: Model, sae: MatryoshkaSAE, tinystories: Path, tmp_path: Path
):
    written, mine = tmp_path / "written", tmp_path / "mine"
    saes, core = levels("ours", sae, [0]), _core(tinystories / "data")
    evaluate(saes, model, written, [core])
    evaluate(saes, model, written, [core])  # its own files it replaces
    mine.write_text("mine")
    put: dict[str, Callable[[Path], object]] = {
        "file": lambda path: path.write_text("sae,metric,value\nmine,1,2\n"),
        "link": lambda path: path.symlink_to(mine),
        "folder": Path.mkdir,
    }
    for name in ("results.csv", "metrics_by_width.png", "metrics_by_l0.png", "core"):
        for kind in put if name != "core" else ("file", "link"):
            output = tmp_path / f"{kind} for {name}"
            shutil.copytree(written, output)
            path = output / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            put[kind](path)
            before = {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}
            with pytest.raises(UserError, match=f"{name} (was not written by evaluate|is a file)"):
                evaluate(saes, model, output, [core], force=True)
            assert {file: file.read_bytes() for file in output.rglob("*") if file.is_file()} == before
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["levels", "whole", "widths by hand", "trained here"])
def test_results_are_published_with_the_weights_that_they_were_measured_on_and_no_others(
    kind: str, dtype: str, sae: MatryoshkaSAE, tmp_path: Path
):
    folder, widths, saved = tmp_path / "ours", None, sae
    if kind in ("whole", "widths by hand"):
        saved = sae.at_level(-1)
        saved.cfg.metadata.matryoshka_widths = None
        widths = None if kind == "whole" else [16, 128]
    saved.save_model(folder)
    if kind == "trained here":
        torch.manual_seed(0)
        trained = MatryoshkaTrainingSAE(MatryoshkaTrainingSAEConfig(64, 128, k=3, matryoshka_widths=[16, 48]))
        trained.topk_threshold += 0.1
        trained.save_inference_model(folder)
    loaded = load_any(folder, widths=widths)
    for evaluated in on_device(levels("ours", loaded), torch.device("cpu"), getattr(torch, dtype)):
        row = {"sae": "ours", "level": evaluated.level, "width": evaluated.width, "weights": evaluated.hash}
        results = tmp_path / str(evaluated.level)
        results.mkdir()
        pd.DataFrame([{**row, "metric": "m", "value": 1.0}]).to_csv(results / "results.csv", index=False)
        (entry,) = plan_upload(find_saved_saes(folder), tmp_path, results=results).entries
        assert entry.results[0]["value"] == "1.0"
        assert "weights" not in entry.results[0]
    weights = load_file(folder / "sae_weights.safetensors")
    weights["b_dec"][0] += 1
    save_file(weights, folder / "sae_weights.safetensors")
    for results in (path for path in tmp_path.iterdir() if (path / "results.csv").is_file()):
        with pytest.raises(UserError, match="were measured on other weights or settings than it has now"):
            plan_upload(find_saved_saes(folder), tmp_path, results=results)


def test_results_csv_says_what_was_measured(sae: MatryoshkaSAE, tinystories: Path, model: Model, tmp_path: Path):
    sae.save_model(tmp_path / "ours")
    evaluate(levels("ours", load_any(tmp_path / "ours")), model, tmp_path / "out", [_core(tinystories / "data")])
    saved = find_saved_saes(tmp_path / "ours")
    assert len(plan_upload(saved, tmp_path, results=tmp_path / "out").entries[0].results) > 50
    sae.b_dec.data[0] += 1
    sae.save_model(tmp_path / "ours")
    with pytest.raises(UserError, match=r"results about level 0 of .*ours were measured on other weights"):
        plan_upload(find_saved_saes(tmp_path / "ours"), tmp_path, results=tmp_path / "out")
