"""What every evaluation refuses in one sentence, and what a failing one leaves to the others."""

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_bench.evals.absorption.eval_output import AbsorptionMeanMetrics

from sae_lens_matryoshka import MatryoshkaSAE, MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig
from sae_lens_matryoshka.bench import evaluate
from sae_lens_matryoshka.bench.absorption import _deviation
from sae_lens_matryoshka.bench.concept_erasure import ConceptErasure
from sae_lens_matryoshka.bench.core import Core
from sae_lens_matryoshka.bench.evaluated_saes import levels
from sae_lens_matryoshka.bench.evaluation import Evaluation
from sae_lens_matryoshka.bench.labelled_text import LabelledText
from sae_lens_matryoshka.bench.meta_structure import MetaStructure
from sae_lens_matryoshka.bench.models import Model
from sae_lens_matryoshka.bench.sparse_probing import SparseProbing
from sae_lens_matryoshka.bench.upstream import CoreEvalConfig, MetaStructureEvalConfig
from sae_lens_matryoshka.errors import UserError

TEXTS = {label: [f"{label} text number {i} here" for i in range(4)] for label in "ab"}
FEW = [LabelledText("few", TEXTS, {label: texts[:1] for label, texts in TEXTS.items()})]


def _core(text: Path) -> Core:
    return Core(CoreEvalConfig(dataset=str(text), context_size=32, batch_size_prompts=4,
                               n_eval_reconstruction_batches=1, n_eval_sparsity_variance_batches=1))  # fmt: skip


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        ("blocks.9.hook_resid_post", "is no hook of .*, whose layers are 0 to 4; name one as blocks.4.hook_resid_post"),
        ("model.layers.7", "hook_name='blocks.7.hook_resid_post' is no hook"),
        ("blocks.2.nonsense", "is no hook of .* name one as blocks.2.hook_resid_post"),
        ("blocks.2.attn.hook_z", r"activations of shape \[8, 8\] a token, but ours level 2 takes d_in=64"),
        ("blocks.2.mlp.hook_pre", r"activations of shape \[172\] a token, but ours level 2 takes d_in=64"),
    ],
)
@pytest.mark.parametrize("kind", ["probing", "core"])
def test_a_hook_that_does_not_fit(
    kind: str, hook: str, message: str, model: Model, sae: MatryoshkaSAE, tinystories: Path, tmp_path: Path
):
    evaluation: Evaluation = SparseProbing(None, FEW) if kind == "probing" else _core(tinystories / "data")
    with pytest.raises(UserError, match=message):
        evaluation.run(levels("ours", sae, [2]), model, tmp_path, hook)


@pytest.mark.parametrize("content", ["", '{"text": "Once"}\n', '{"text": ""}\n'])
def test_core_on_text_that_fills_no_batch(content: str, model: Model, sae: MatryoshkaSAE, tmp_path: Path):
    (tmp_path / "text.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"text\.jsonl' has no|There are no rows in .*text\.jsonl"):
        _core(tmp_path / "text.jsonl").run(levels("ours", sae, [2]), model, tmp_path)


def test_a_handful_of_texts_is_enough_for_probing_and_erasure(model: Model, sae: MatryoshkaSAE, tmp_path: Path):
    for evaluation in (SparseProbing(None, FEW), ConceptErasure(None, FEW)):
        assert evaluation.run(levels("ours", sae, [2]), model, tmp_path)


def test_absorption_of_a_single_letter_has_a_deviation():
    """``min_feats_for_eval=1`` is what the error about too few letters leads to."""
    names = AbsorptionMeanMetrics.__dataclass_fields__
    assert AbsorptionMeanMetrics(**{name: _deviation([0.5]) for name in names})
    assert _deviation([0.0, 1.0]) == pytest.approx(0.5**0.5)


def test_an_evaluation_that_fails_leaves_the_others_to_run(
    model: Model, sae: MatryoshkaSAE, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    class Broken(MetaStructure):
        name = "core"

        def evaluate(self, group: Any, hook: Any, source: Any) -> Iterator[Any]:
            raise ZeroDivisionError("float division by zero")

    meta = MetaStructureEvalConfig(train_steps=2, autocast=False)
    report = evaluate(levels("ours", sae, [0]), model, tmp_path, [Broken(meta), MetaStructure(meta)])
    assert set(report.results["evaluation"]) == {"meta_structure"}
    assert report.failures == {
        "core": "ZeroDivisionError: float division by zero. This is a bug of sae-lens-matryoshka; "
        "please report it with the traceback above."
    }
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
def test_saes_can_be_pickled_and_copied_for_the_workers_of_data_loaders(sae: MatryoshkaSAE, normalize: Any):
    cfg = MatryoshkaTrainingSAEConfig(
        64, 20, k=3, matryoshka_widths=[5, 20], normalize_activations=normalize, order_latents_by="contribution"
    )
    training = MatryoshkaTrainingSAE(cfg)
    training.latent_order_statistic[3] = 5
    x = torch.randn(7, 64)
    for original in (sae, sae.at_level(1), training, MatryoshkaSAE.from_sae(training)):
        for copied in (pickle.loads(pickle.dumps(original)), copy.deepcopy(original)):
            torch.testing.assert_close(copied(x), original(x), rtol=0, atol=0)
            torch.testing.assert_close(dict(copied.named_buffers()), dict(original.named_buffers()))
            before = original(x)
            acts = original.encode(x)
            copied.encode(10 * x)  # the statistics of a sample are the copy's own
            torch.testing.assert_close(original.decode(acts), before)
