"""Results and cache entries are reused only where everything that could change them is the same, by content."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sae_lens import SAE
from torch import nn

from sae_lens_matryoshka import MatryoshkaSAE
from sae_lens_matryoshka.bench import evaluate, fingerprints
from sae_lens_matryoshka.bench.absorption import Absorption
from sae_lens_matryoshka.bench.activation_source import ActivationSource, TextSpec
from sae_lens_matryoshka.bench.cache import Cache
from sae_lens_matryoshka.bench.core import Core
from sae_lens_matryoshka.bench.evaluated_saes import Hook, SAEView, levels
from sae_lens_matryoshka.bench.fingerprints import model_hash, module_hash, path_hash, tokenizer_hash
from sae_lens_matryoshka.bench.meta_structure import MetaStructure
from sae_lens_matryoshka.bench.models import Model, load_model
from sae_lens_matryoshka.bench.results import load_results
from sae_lens_matryoshka.bench.sparse_probing import SparseProbing
from sae_lens_matryoshka.bench.upstream import AbsorptionEvalConfig, CoreEvalConfig, MetaStructureEvalConfig
from sae_lens_matryoshka.errors import UserError

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
            self.source.pooled_latents(spec, SAEView(self.sae, self.hook, "model"))
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
    before = source.pooled_latents(spec, SAEView(sae, HOOK, "model")).of_texts.train["a"]
    with torch.no_grad():
        sae.W_enc[:, 1::2] = 0
    after = source.pooled_latents(spec, SAEView(sae, HOOK, "model")).of_texts.train["a"]
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
