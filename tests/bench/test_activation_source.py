"""What is shared is computed once: activations by the model, latents by an SAE, for all levels and evaluations."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from sae_lens_matryoshka import MatryoshkaSAE
from sae_lens_matryoshka.bench.activation_source import ActivationSource
from sae_lens_matryoshka.bench.cache import Cache
from sae_lens_matryoshka.bench.concept_erasure import ConceptErasure
from sae_lens_matryoshka.bench.evaluated_saes import levels
from sae_lens_matryoshka.bench.labelled_text import LabelledText
from sae_lens_matryoshka.bench.models import Model
from sae_lens_matryoshka.bench.sparse_probing import SparseProbing
from sae_lens_matryoshka.bench.upstream import ScrAndTppEvalConfig, SparseProbingEvalConfig

N_CLASSES, N_TRAIN, N_TEST, CONTEXT = 4, 20, 10, 16


@contextmanager
def _counted(model: Model, sae: MatryoshkaSAE) -> Iterator[dict[str, int]]:
    """How many texts the model reads and how many tokens the SAE encodes."""
    counts = {"texts": 0, "encoded": 0}
    run_with_cache, encode = model.run_with_cache, sae.encode

    def counting_run(tokens: Tensor, *arguments: Any, **options: Any) -> Any:
        if tokens.shape[1] > 1:  # else the one token that shows what the hook gives
            counts["texts"] += len(tokens)
        return run_with_cache(tokens, *arguments, **options)

    def counting_encode(x: Tensor, *arguments: Any) -> Any:
        counts["encoded"] += x[..., 0].numel()
        return encode(x, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "run_with_cache", counting_run)
        patch.setattr(sae, "encode", counting_encode)
        yield counts


def _evaluate(source: ActivationSource, sae: MatryoshkaSAE, snippets: dict[str, list[str]], output: Path) -> list[str]:
    data = [LabelledText("kinds", snippets, snippets)]
    sizes: dict[str, Any] = {"dataset_names": ["kinds"], "context_length": CONTEXT}
    probing = SparseProbingEvalConfig(
        probe_train_set_size=2 * N_TRAIN, probe_test_set_size=2 * N_TEST, k_values=[1], **sizes
    )
    erasure = ScrAndTppEvalConfig(
        train_set_size=2 * N_TRAIN,
        test_set_size=2 * N_TEST,
        n_values=[2, 5],
        probe_epochs=1,
        perform_scr=False,
        **sizes,
    )
    paths = SparseProbing(probing, data).run(levels("ours", sae), source, output)
    paths += ConceptErasure(erasure, data).run(levels("ours", sae), source, output)
    return [path.read_text().split('"eval_result_metrics"')[1].split('"sae_bench')[0] for path in paths]


def test_all_levels_and_evaluations_read_and_encode_every_text_once(
    model: Model, sae: MatryoshkaSAE, snippets: dict[str, list[str]], tmp_path: Path
):
    n_texts = N_CLASSES * (N_TRAIN + N_TEST)
    with _counted(model, sae) as counts:
        first = _evaluate(ActivationSource(model, Cache(tmp_path / "cache")), sae, snippets, tmp_path / "first")
        n_encoded = n_texts * (CONTEXT - 1) + 1  # all but BOS, and once the latents of nothing
        assert counts == {"texts": n_texts, "encoded": n_encoded}
        again = _evaluate(ActivationSource(model, Cache(tmp_path / "cache")), sae, snippets, tmp_path / "again")
        assert counts == {"texts": n_texts, "encoded": n_encoded}
    assert again == first


def test_without_a_folder_the_numbers_are_the_same(
    model: Model, sae: MatryoshkaSAE, snippets: dict[str, list[str]], tmp_path: Path
):
    in_memory = _evaluate(ActivationSource(model), sae, snippets, tmp_path / "memory")
    nothing_kept = _evaluate(ActivationSource(model, Cache(max_bytes=0)), sae, snippets, tmp_path / "nothing")
    assert in_memory == nothing_kept
