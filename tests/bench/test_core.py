"""The core evaluation equals SAEBench's own run, and says what variance is explained as SAELens computes it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import AutoTokenizer

from sae_lens_matryoshka import MatryoshkaSAE
from sae_lens_matryoshka.bench import core, upstream
from sae_lens_matryoshka.bench.activation_source import ActivationSource
from sae_lens_matryoshka.bench.beyond_saebench import Beyond
from sae_lens_matryoshka.bench.core import EXPLAINED_VARIANCE, Core
from sae_lens_matryoshka.bench.evaluated_saes import EvaluatedSAE, Hook, levels
from sae_lens_matryoshka.bench.standard_errors import of_ratio
from sae_lens_matryoshka.bench.upstream import CoreEvalConfig, core_main
from tests.bench.fixtures import HOOK, assert_equal, upstream_sae


def test_every_level_equals_saebench_own_run(
    sae: MatryoshkaSAE,
    source: ActivationSource,
    upstream_run: Callable[..., Any],
    tinystories: Path,
    tmp_path: Path,
):
    config = _config(tinystories, exclude_special_tokens_from_reconstruction=True)
    ours = Core(config).run(levels("ours", sae), source, tmp_path / "ours")
    for evaluated, path in zip(levels("ours", sae), ours, strict=True):
        folder = tmp_path / f"theirs-{evaluated.level}"
        upstream_run(
            core_main.multiple_evals,
            [("ours", upstream_sae(evaluated))],
            n_eval_reconstruction_batches=2,
            n_eval_sparsity_variance_batches=3,
            eval_batch_size_prompts=4,
            compute_featurewise_density_statistics=True,
            compute_featurewise_weight_based_metrics=True,
            exclude_special_tokens_from_reconstruction=True,
            dataset=config.dataset,
            context_size=64,
            output_folder=str(folder),
            device="cpu",
        )
        theirs = json.loads((folder / "ours_custom_sae_eval_results.json").read_text())
        written = json.loads(path.read_text())
        for part in ("eval_config", "eval_result_metrics", "eval_result_details"):
            assert_equal(written[part], theirs[part])
        assert written["eval_result_metrics"]["sparsity"]["l0"] > 1
        assert written["eval_result_unstructured"][EXPLAINED_VARIANCE] == pytest.approx(
            _explained_variance(evaluated, config, source), abs=1e-5
        )
        errors = dict(Beyond.of(written["eval_result_unstructured"]).standard_errors)
        assert errors.pop("ce_loss_with_ablation") == 0  # without activations every token is as likely
        assert {"ce_loss_score", "kl_div_score", "ce_loss_with_sae", "l0", EXPLAINED_VARIANCE} <= set(errors)
        assert all(0 < error < 1 for error in errors.values())


def test_errors_are_of_the_sequences_that_saebench_averages_over(
    sae: MatryoshkaSAE, source: ActivationSource, tinystories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ratios: list[float] = []

    def recording(numerators: torch.Tensor, denominators: torch.Tensor) -> float:
        assert len(numerators) == len(denominators) in (8, 12)  # two batches of 4 prompts, and three
        ratios.append(float(numerators.sum() / denominators.sum()))
        return of_ratio(numerators, denominators)

    monkeypatch.setattr(core, "of_ratio", recording)
    (path,) = Core(_config(tinystories)).run(levels("ours", sae, [-1]), source, tmp_path)
    metrics = json.loads(path.read_text())["eval_result_metrics"]
    performance, behavior = metrics["model_performance_preservation"], metrics["model_behavior_preservation"]
    averages = [
        performance["ce_loss_score"], performance["ce_loss_with_sae"], performance["ce_loss_without_sae"],
        behavior["kl_div_with_sae"], metrics["sparsity"]["l0"], 1 - behavior["kl_div_score"],
    ]  # fmt: skip
    for average in averages:
        assert any(ratio == pytest.approx(average, abs=1e-5) for ratio in ratios), average


def test_special_tokens_are_left_out_for_saes_that_were_trained_without_them(
    sae: MatryoshkaSAE, source: ActivationSource, tinystories: Path, tmp_path: Path
):
    def loss_recovered(name: str, excluded: Any, **options: Any) -> tuple[bool, float]:
        sae.cfg.metadata.exclude_special_tokens = excluded
        follow = options.pop("follow_training", True)
        (path,) = Core(_config(tinystories, **options), follow).run(levels(name, sae, [2]), source, tmp_path)
        written = json.loads(path.read_text())
        metrics = written["eval_result_metrics"]["model_performance_preservation"]
        return written["eval_config"]["exclude_special_tokens_from_reconstruction"], metrics["ce_loss_with_sae"]

    as_saebench = loss_recovered("as_saebench", False)
    asked_for = loss_recovered("asked_for", False, exclude_special_tokens_from_reconstruction=True)
    assert as_saebench[0] is False
    assert asked_for[0] is True
    assert asked_for[1] != as_saebench[1]
    assert loss_recovered("as_trained", True) == asked_for
    assert loss_recovered("listed", [1, 2]) == asked_for
    # what else it was trained without is left out too
    full_stop = source.model.tokenizer.encode(".")[-1]  # type: ignore[union-attr]
    assert loss_recovered("full_stop", [full_stop])[1] not in (asked_for[1], as_saebench[1])
    assert loss_recovered("not_followed", True, follow_training=False) == as_saebench


def test_a_bos_that_is_the_padding_token_too_is_no_padding(tinystories: Path, tmp_path: Path, sae: MatryoshkaSAE):
    """TransformerLens would mask it in the rows of a HookedTransformer whose tokenizer pads on the left."""
    metrics: list[Any] = []
    for side in ("left", "right"):
        tokenizer = AutoTokenizer.from_pretrained(tinystories / "model")
        torch.manual_seed(0)
        model = HookedTransformer(
            HookedTransformerConfig(
                n_layers=3, d_model=64, n_ctx=64, d_head=16, d_vocab=len(tokenizer), act_fn="gelu", seed=0,
                positional_embedding_type="rotary", model_name="random",
            ),
            tokenizer=tokenizer,
        )  # fmt: skip
        tokenizer = model.tokenizer  # TransformerLens has made its own, with defaults of its own
        tokenizer.padding_side, tokenizer.pad_token = side, tokenizer.bos_token  # type: ignore[union-attr]
        (path,) = Core(_config(tinystories)).run(levels("ours", sae, [2]), model, tmp_path / side)
        assert model.tokenizer.padding_side == side  # type: ignore[union-attr]
        written = json.loads(path.read_text())
        metrics.append([written["eval_result_metrics"], written["eval_result_unstructured"]])
    assert_equal(metrics[0], metrics[1])


def _config(tinystories: Path, **settings: Any) -> CoreEvalConfig:
    return CoreEvalConfig(
        model_name="tinystories", dataset=str(tinystories / "data"), context_size=64, batch_size_prompts=4,
        n_eval_reconstruction_batches=2, n_eval_sparsity_variance_batches=3, **settings,
    )  # fmt: skip


def _explained_variance(evaluated: EvaluatedSAE, config: CoreEvalConfig, source: ActivationSource) -> float:
    """1 - FVU in float64, on the tokens that are not special."""
    core = Core(config)
    with upstream.contained():
        _, tokens = core._tokens(core.view(evaluated, Hook(HOOK, 2), source), source)
    x = torch.cat([source.model.run_with_cache(batch)[1][HOOK][batch > 2] for batch in tokens]).double()
    error = x - evaluated.cut_out.double()(x)
    evaluated.cut_out.float()
    return 1 - (error.square().sum() / (x - x.mean(0)).square().sum()).item()
