"""SAEBench on the TinyStories model: a small SAE, labelled text by rule, and SAEBench's own run to compare with."""

import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_bench.evals.sparse_probing import main as sparse_probing_main
from sae_lens.saes.sae import SAEMetadata

from sae_lens_matryoshka import MatryoshkaJumpReLUSAE
from sae_lens_matryoshka.bench import upstream
from sae_lens_matryoshka.bench.activation_source import ActivationSource
from sae_lens_matryoshka.bench.evaluated_saes import EvaluatedSAE
from sae_lens_matryoshka.bench.models import Model, load_model
from tests.conftest import random_matryoshka_sae

HOOK = "blocks.2.hook_resid_post"
CLASSES = {"0": r'"', "1": r"\b(she|her)\b", "2": r"\b(he|his)\b", "3": r""}
"""A rule a class: the first that a text matches is its class."""


@pytest.fixture(scope="session")
def model(tinystories: Path) -> Model:
    return load_model(tinystories / "model")


@pytest.fixture
def source(model: Model) -> ActivationSource:
    return ActivationSource(model)


@pytest.fixture(scope="session")
def snippets(tinystories: Path) -> dict[str, list[str]]:
    """Three sentences a text, by class."""
    by_class: dict[str, list[str]] = {label: [] for label in CLASSES}
    with (tinystories / "data" / "train.jsonl").open(encoding="utf-8") as file:
        for line in file:
            sentences = re.split(r'(?<=[.!?"])\s+', json.loads(line)["text"])
            for start in range(0, len(sentences) - 2, 3):
                text = " ".join(sentences[start : start + 3])
                label = next(label for label, rule in CLASSES.items() if re.search(rule, text, re.IGNORECASE))
                by_class[label].append(text)
    return {label: texts[:150] for label, texts in by_class.items()}


@pytest.fixture
def sae() -> MatryoshkaJumpReLUSAE:
    """Latents that fire on some tokens and a decoder of unit norm, as SAEBench wants it."""
    sae = random_matryoshka_sae([16, 48, 128], d_in=64)
    sae.cfg.metadata = SAEMetadata(hook_name=HOOK, model_name="tinystories", prepend_bos=True, context_size=64)
    with torch.no_grad():
        sae.W_dec.div_(sae.W_dec.norm(dim=-1, keepdim=True))
        sae.W_enc.copy_(sae.W_dec.T)
        sae.b_enc.mul_(0.1)
        sae.b_dec.mul_(0.1)
        sae.threshold.mul_(0.5)
    return sae


@pytest.fixture
def upstream_run(model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Calls SAEBench inside :func:`contained`, in a folder of its own, with our model in place of a download."""
    for module in (upstream.absorption_main, upstream.core_main, upstream.scr_and_tpp_main, sparse_probing_main):
        monkeypatch.setattr(module.HookedTransformer, "from_pretrained_no_processing", lambda *_, **__: model)
    folder = tmp_path / "upstream"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def run(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        with upstream.contained():
            return function(*arguments, **options)

    yield run  # noqa: PT022 - the patches end with the test


def upstream_sae(evaluated: EvaluatedSAE) -> Any:
    """The SAE as a user would hand it to SAEBench, which edits its config."""
    return copy.deepcopy(evaluated.cut_out)


def assert_equal(ours: Any, theirs: Any, tolerance: float = 1e-6) -> None:
    """Two nested results are the same, numbers up to a tolerance."""
    if isinstance(theirs, dict):
        assert set(ours) == set(theirs)
        for key, value in theirs.items():
            assert_equal(ours[key], value, tolerance)
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert_equal(a, b, tolerance)
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, abs=tolerance, nan_ok=True)
    else:
        assert ours == theirs
