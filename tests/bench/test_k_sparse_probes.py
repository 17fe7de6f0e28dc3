"""Probes by two rules: SAEBench's numbers are SAEBench's, and the other rule is what its formula says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lens_matryoshka.bench.k_sparse_probes import dense_answers, top_k_answers, top_k_standardized
from sae_lens_matryoshka.bench.upstream import contained, probe_training


def _classes(n: int, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    texts = torch.randn(3 * n, 12, generator=generator)
    for label in range(3):
        texts[label * n : (label + 1) * n, label] += 1.5
    texts[:, 11] = texts[:, 11] * 500 + 3000  # large, and says nothing
    return {str(label): of_class.to(dtype) for label, of_class in enumerate(texts.split(n))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_by_saebench_own_rule_every_number_is_saebench_own(dtype: torch.dtype):
    train, test = _classes(40, 0, dtype), _classes(20, 1, dtype)
    with contained():
        torch.manual_seed(3)
        ours = top_k_answers(train, test, [1, 3])
        dense = dense_answers(train, test)
        state = torch.get_rng_state()
        torch.manual_seed(3)
        for k in (1, 3):
            _, theirs = probe_training.train_probe_on_activations(train, test, select_top_k=k)
            assert {label: answers.accuracy for label, answers in ours[k][0].items()} == theirs
        _, theirs = probe_training.train_probe_on_activations(
            train, test, select_top_k=None, use_sklearn=False, batch_size=250, epochs=100, lr=1e-2
        )
        assert {label: answers.accuracy for label, answers in dense.items()} == theirs
        assert torch.equal(torch.get_rng_state(), state)  # and what comes after it is as after SAEBench
    everything = [*ours[1][0].values(), *ours[1][1].values(), *ours[3][1].values(), *dense.values()]
    for answers in everything:
        assert answers.accuracy == pytest.approx(float(answers.right.float().mean()))
        assert len(answers.texts.unique()) == 40


def test_a_large_latent_that_says_nothing_is_not_chosen_by_standardized_difference():
    with contained():
        torch.manual_seed(0)
        by_saebench, standardized = top_k_answers(_classes(100, 0), _classes(100, 1), [1])[1]
    assert all(answers.accuracy < 0.6 for answers in by_saebench.values())
    assert all(answers.accuracy > 0.7 for answers in standardized.values())


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 30), st.integers(2, 30), st.integers(1, 6), st.integers(0, 1000))
def test_the_standardized_difference_is_that_of_its_formula(n_of: int, n_other: int, k: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    acts = torch.randn(n_of + n_other, 6, generator=generator) * 10.0 ** torch.arange(-2, 4)
    acts[:, 0] = 0.1  # never varies
    labels = torch.tensor([1] * n_of + [0] * n_other)[torch.randperm(n_of + n_other, generator=generator)]
    of, other = acts[labels == 1].double(), acts[labels == 0].double()
    pooled = ((n_of - 1) * of.var(dim=0) + (n_other - 1) * other.var(dim=0)) / (n_of + n_other - 2)
    expected = ((of.mean(dim=0) - other.mean(dim=0)).abs() / pooled.sqrt())[1:]
    chosen = top_k_standardized(acts, labels, min(k, 5))
    assert not chosen[0]
    assert set(chosen.nonzero()[:, 0].tolist()) == {1 + int(i) for i in expected.topk(min(k, 5)).indices}


def test_a_latent_that_varies_only_between_classes_comes_first():
    acts = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([1, 0] * 10)
    acts[:, 2] = labels * 0.1
    assert top_k_standardized(acts, labels, 1).tolist() == [False, False, True]
