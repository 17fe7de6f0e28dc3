"""sae_probes level by level equals SAEBench's own run on each level."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_bench.evals.sparse_probing_sae_probes import main as upstream_main
from sae_probes import generate_model_activations
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from sae_lens_matryoshka import MatryoshkaSAE
from sae_lens_matryoshka.bench.activation_source import ActivationSource
from sae_lens_matryoshka.bench.beyond_saebench import Beyond
from sae_lens_matryoshka.bench.evaluated_saes import Hook, levels
from sae_lens_matryoshka.bench.sae_probes import SaeProbes, _errors
from sae_lens_matryoshka.bench.upstream_sae_probes import SparseProbingSaeProbesEvalConfig, utils_data
from sae_lens_matryoshka.errors import UserError
from tests.bench.fixtures import assert_equal, upstream_sae

DATA_SETS = ["117_us_state_FL", "95_toxic_is"]


def _config(**settings: Any) -> SparseProbingSaeProbesEvalConfig:
    return SparseProbingSaeProbesEvalConfig(model_name="tinystories", dataset_names=DATA_SETS, ks=[1, 3], **settings)


@pytest.fixture(autouse=True)
def few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The beginnings of 160 texts of a data set, in sae_probes' own format."""
    read = utils_data.read_numbered_dataset_df
    frames: dict[str, Any] = {}

    def first(name: str) -> Any:
        if name not in frames:
            frame = read(name)
            by_class = [of_class.head(80) for _, of_class in frame.groupby("target")]
            frames[name] = type(frame)(
                {
                    "prompt": [
                        str(text)[:150]
                        for pair in zip(*(part["prompt"] for part in by_class), strict=True)
                        for text in pair
                    ],
                    "target": [
                        label for pair in zip(*(part["target"] for part in by_class), strict=True) for label in pair
                    ],
                }
            )
        return frames[name]

    monkeypatch.setattr(utils_data, "read_numbered_dataset_df", first)


@pytest.mark.parametrize("settings", [{}, {"reg_type": "l2", "include_llm_baseline": False}])
def test_every_level_equals_saebench_own_run(
    settings: dict[str, Any],
    sae: MatryoshkaSAE,
    source: ActivationSource,
    upstream_run: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    tokenizer: Any = source.model.tokenizer
    monkeypatch.setattr(tokenizer, "padding_side", tokenizer.padding_side)  # sae_probes sets both
    monkeypatch.setattr(tokenizer, "truncation_side", tokenizer.truncation_side)
    evaluation = SaeProbes(_config(**settings))
    ours = evaluation.run(levels("ours", sae, [0, -1]), source, tmp_path / "ours")

    def activations_at(dataset_path: Path, hook_names: list[str], model_cache_path: Path, **_: Any) -> None:
        name = Path(dataset_path).name.removesuffix(".csv.zst")
        found = generate_model_activations._process_activations(
            source.model,  # type: ignore[arg-type]
            utils_data.read_numbered_dataset_df(name)["prompt"].tolist(),
            32,
            1024,
            hook_names,
            None,
            "cpu",
        )
        folder = Path(model_cache_path) / "model_activations_tinystories"
        folder.mkdir(parents=True, exist_ok=True)
        draw = evaluation._draw(name)
        for hook, values in found.items():
            ours = torch.cat(evaluation._activations(name, draw, Hook(hook, 2), source))
            rows = [*draw.train, *draw.test]
            torch.testing.assert_close(ours, values[rows], rtol=1e-4, atol=1e-4)
            values[rows] = ours  # so that no text is on the other side of a threshold by rounding
            torch.save(values, folder / f"{name}_{hook}.pt")

    # SAEBench's run reads the same rows, and finds their number in a table
    monkeypatch.setattr(generate_model_activations, "generate_single_dataset_activations", activations_at)
    monkeypatch.setattr(
        generate_model_activations.HookedTransformer, "from_pretrained_no_processing", lambda *_, **__: source.model
    )
    sizes = dict.fromkeys(DATA_SETS, 160)
    monkeypatch.setattr("sae_probes.generate_sae_activations.DATASET_SIZES", sizes)
    monkeypatch.setattr("sae_probes.run_baselines.DATASET_SIZES", sizes)
    for evaluated, path in zip(levels("ours", sae, [0, -1]), ours, strict=True):
        folder = tmp_path / f"theirs-{evaluated.level}"
        upstream_run(
            upstream_main.run_eval,
            _config(results_path=str(folder / "results"), model_cache_path=str(folder / "cache"), **settings),
            [("ours", upstream_sae(evaluated))],
            "cpu",
            str(folder / "out"),
        )
        written = json.loads(path.read_text())
        theirs = json.loads(next((folder / "out").glob("*.json")).read_text())
        for part in ("eval_result_metrics", "eval_result_details", "sae_metrics_by_k"):
            assert_equal(written[part], theirs[part])
        beyond = Beyond.of(written["eval_result_unstructured"])
        assert 0 < beyond.standard_errors["sae_top_1_test_auc"] < 0.2
        assert ("llm_top_1_test_auc" in beyond.metrics) == ("include_llm_baseline" not in settings)


def test_fewer_texts_where_they_are_limited(sae: MatryoshkaSAE, source: ActivationSource, tmp_path: Path):
    config = SparseProbingSaeProbesEvalConfig(dataset_names=DATA_SETS[:1], ks=[1], include_llm_baseline=False)
    (path,) = SaeProbes(config, limit_texts=10).run(levels("ours", sae, [0]), source, tmp_path)
    written = json.loads(path.read_text())
    assert Beyond.of(written["eval_result_unstructured"]).details == {"limit_texts": 10}
    assert written["eval_result_metrics"]["sae"]["sae_top_1_test_accuracy"] * 10 == pytest.approx(
        round(written["eval_result_metrics"]["sae"]["sae_top_1_test_accuracy"] * 10)
    )
    with pytest.raises(UserError, match="limit_texts=10, now None"):
        SaeProbes(config).run(levels("ours", sae, [0]), source, tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset_names": ["none"]}, r"dataset_names=\['none'\] must be among those of sae_probes"),
        ({"dataset_names": []}, r"dataset_names=\[\] must be among"),
        ({"ks": [0]}, r"ks=\[0\] must be"),
        ({"setting": "scarcity"}, "setting='scarcity' must be normal"),
        ({"baseline_method": "x"}, "baseline_method='x' must be logreg or"),
        ({"results_path": "x"}, "results_path is not used here"),
    ],
)
def test_mistakes_are_one_sentence(settings: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        SaeProbes(SparseProbingSaeProbesEvalConfig(**settings))


def test_errors_of_the_area_under_the_curve_are_those_of_many_draws():
    generator = torch.Generator().manual_seed(0)
    classifier = LogisticRegression().fit([[0.0], [1.0]], [0, 1])
    areas, errors = [], []
    for _ in range(1000):
        labels = torch.tensor([0, 0, 1] * 80)
        inputs = (torch.randn(240, generator=generator) + labels).round(decimals=1)[:, None]  # with ties
        areas.append(roc_auc_score(labels, classifier.predict_proba(inputs)[:, 1]))
        errors.append(_errors(classifier, inputs, labels)["test_auc_error"])
    assert torch.tensor(errors).mean() == pytest.approx(float(torch.tensor(areas).std()), rel=0.07)
