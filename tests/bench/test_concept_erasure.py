"""TPP and SCR equal SAEBench's own run, for every level."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from sae_bench.evals.scr_and_tpp import main as scr_and_tpp_main

from sae_lens_matryoshka import MatryoshkaSAE
from sae_lens_matryoshka.bench import upstream
from sae_lens_matryoshka.bench.activation_source import ActivationSource
from sae_lens_matryoshka.bench.beyond_saebench import BEYOND, Beyond
from sae_lens_matryoshka.bench.concept_erasure import ConceptErasure
from sae_lens_matryoshka.bench.evaluated_saes import levels
from sae_lens_matryoshka.bench.upstream import ScrAndTppEvalConfig
from tests.bench.fixtures import assert_equal, upstream_sae

BIAS_IN_BIOS = "LabHC/bias_in_bios_class_set1"
PROFESSIONS = [0, 1, 2, 6, 9]
PROFESSOR_AND_NURSE = [21, 13]


@pytest.fixture
def bias_in_bios(snippets: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """What SAEBench would download, with our texts in it: professions by the number of pronouns, gender by tense."""
    texts = sorted((text for in_class in snippets.values() for text in in_class), key=_n_pronouns)
    rows: list[dict[str, Any]] = []
    for index, text in enumerate(texts):
        of_five, of_two = PROFESSIONS[index * 5 // len(texts)], PROFESSOR_AND_NURSE[index * 2 // len(texts)]
        rows.append({"hard_text": text, "profession": of_five, "gender": index % 2})
        rows.append({"hard_text": text, "profession": of_two, "gender": int(" was " in text)})
    data = {"train": pd.DataFrame(rows), "test": pd.DataFrame(rows[::-1])}
    monkeypatch.setattr(upstream.dataset_utils, "load_dataset", lambda *_, **__: data)
    monkeypatch.setattr(upstream.scr_dataset_creation, "load_dataset", lambda *_, **__: data)


def _n_pronouns(text: str) -> int:
    return len(re.findall(r"\b(she|her)\b", text, re.IGNORECASE)) - len(
        re.findall(r"\b(he|his|him)\b", text, re.IGNORECASE)
    )


def _config(perform_scr: bool) -> ScrAndTppEvalConfig:
    return ScrAndTppEvalConfig(
        dataset_names=[BIAS_IN_BIOS], perform_scr=perform_scr, train_set_size=80, test_set_size=80, context_length=32,
        llm_batch_size=32, llm_dtype="float32", model_name="tinystories", n_values=[5, 10], probe_epochs=20,
        probe_lr=1e-2,        column1_vals_lookup={BIAS_IN_BIOS: [("professor", "nurse")]},
    )  # fmt: skip


@pytest.mark.usefixtures("bias_in_bios")
@pytest.mark.parametrize("perform_scr", [False, True], ids=["tpp", "scr"])
def test_every_level_equals_saebench_own_run(
    perform_scr: bool, sae: MatryoshkaSAE, source: ActivationSource, upstream_run: Callable[..., Any], tmp_path: Path
):
    values: list[float | None] = []
    ours = ConceptErasure(_config(perform_scr)).run(levels("ours", sae), source, tmp_path / "ours")
    for evaluated, path in zip(levels("ours", sae), ours, strict=True):
        (theirs,) = upstream_run(
            scr_and_tpp_main.run_eval,
            _config(perform_scr),
            [("ours", upstream_sae(evaluated))],
            "cpu",
            str(tmp_path / f"theirs-{evaluated.level}"),
            artifacts_path=str(tmp_path / f"artifacts-{evaluated.level}"),
        ).values()
        written = json.loads(path.read_text())
        unstructured = written["eval_result_unstructured"]
        errors = Beyond.of(unstructured).standard_errors
        del unstructured[BEYOND]
        if perform_scr:
            assert unstructured == {}
            assert errors == {}  # one pair of classes
            written["eval_result_unstructured"] = None
        else:
            (by_class,) = unstructured.values()
            for metric, error in errors.items():
                drops = torch.tensor([of_class[metric] for of_class in by_class.values()], dtype=torch.float64)
                assert error == pytest.approx(float(drops.std() / len(drops) ** 0.5))
            assert set(errors) == set(next(iter(by_class.values())))
        for part in ("eval_config", "eval_result_metrics", "eval_result_details", "eval_result_unstructured"):
            assert_equal(written[part], json.loads(json.dumps(theirs[part])))
        values += written["eval_result_metrics"][f"{'scr' if perform_scr else 'tpp'}_metrics"].values()
    assert any(values)
