"""Sparse probing equals SAEBench's own run, for every level."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sae_bench.evals.sparse_probing import main as sparse_probing_main

from sae_lens_matryoshka import MatryoshkaSAE
from sae_lens_matryoshka.bench import LabelledText, load_model, upstream
from sae_lens_matryoshka.bench.activation_source import ActivationSource
from sae_lens_matryoshka.bench.beyond_saebench import BEYOND, Beyond
from sae_lens_matryoshka.bench.evaluated_saes import Hook, levels
from sae_lens_matryoshka.bench.sparse_probing import SparseProbing
from sae_lens_matryoshka.bench.upstream import SparseProbingEvalConfig
from tests.bench.fixtures import assert_equal, upstream_sae
from tests.conftest import real_model

AG_NEWS = "fancyzhx/ag_news"


@pytest.fixture
def ag_news(snippets: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """What SAEBench would download, with our texts in it."""
    rows = [{"label": int(label), "text": text} for label, texts in snippets.items() for text in texts]
    monkeypatch.setattr(upstream.dataset_utils, "load_dataset", lambda *_, **__: {"train": rows, "test": rows[::-1]})


def _config(**settings: Any) -> SparseProbingEvalConfig:
    return SparseProbingEvalConfig(
        dataset_names=[AG_NEWS], probe_train_set_size=120, probe_test_set_size=60, context_length=32, llm_batch_size=32,
        llm_dtype="float32", model_name="tinystories", **settings,
    )  # fmt: skip


@pytest.mark.usefixtures("ag_news")
def test_every_level_equals_saebench_own_run(
    sae: MatryoshkaSAE,
    source: ActivationSource,
    upstream_run: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    tokenizer: Any = source.model.tokenizer
    # SAEBench's HookedTransformer pads on the right, whatever the tokenizer of the model does, as Gemma's on the left
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "padding_side", "left")
        ours = SparseProbing(_config()).run(levels("ours", sae), source, tmp_path / "ours")
    for evaluated, path in zip(levels("ours", sae), ours, strict=True):
        (theirs,) = upstream_run(
            sparse_probing_main.run_eval,
            _config(),
            [("ours", upstream_sae(evaluated))],
            "cpu",
            str(tmp_path / f"theirs-{evaluated.level}"),
            artifacts_path=str(tmp_path / f"artifacts-{evaluated.level}"),
        ).values()
        written = json.loads(path.read_text())
        unstructured = written["eval_result_unstructured"]
        beyond = Beyond.of(unstructured)
        assert set(beyond.metrics) == {
            f"{kind}_top_{k}_standardized_test_accuracy" for kind in ("llm", "sae") for k in (1, 2, 5)
        }
        saebench = {
            f"{kind}{top}_test_accuracy" for kind in ("llm", "sae") for top in ("", "_top_1", "_top_2", "_top_5")
        }
        assert set(beyond.standard_errors) == saebench | set(beyond.metrics)
        assert all(0.01 < error < 0.05 for error in beyond.standard_errors.values())  # of 240 answers on 120 texts
        del unstructured[BEYOND]
        for part in ("eval_result_metrics", "eval_result_details", "eval_result_unstructured"):
            assert_equal(written[part], theirs[part])


def test_the_rule_of_saebench_is_blind_on_a_real_gemma_and_the_other_one_is_not():
    folder = real_model("gemma-3-270m")
    code = ["for i in range(10):\n    print(i)", "def area(r):\n    return 3.14 * r ** 2", "x = [y for y in z if y]"]
    prose = ["The cat sat on the mat.", "She went home after the war.", "It was raining in the north."]
    endings = ["", " ", "\n", "  ", "\n\n", " \n", "\n ", "..."]
    texts = {
        label: [start + end for start, end in itertools.product(starts, endings)]
        for label, starts in (("code", code), ("prose", prose))
    }
    probing = SparseProbing(data=[LabelledText("kind", texts, texts)])
    source = ActivationSource(load_model(folder, dtype="bfloat16"))
    probing.begin(source)
    with upstream.contained():
        probed = probing._probe_language_model(probing._spec("kind", Hook("blocks.9.hook_resid_post", 9)), source)
    by_saebench, standardized = probed.saebench, probed.standardized
    assert min(standardized["llm_top_1_standardized_test_accuracy"].values()) > 0.95
    assert max(by_saebench["llm_top_1_test_accuracy"].values()) < 0.9
