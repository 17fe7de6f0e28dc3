"""Standard errors equal the binomial one, the bootstrap's and what many draws give."""

import math

import pytest
import torch

from sae_lens_matryoshka.bench.standard_errors import (
    Answers,
    of_mean,
    of_mean_accuracy,
    of_mean_of_independent,
    of_ratio,
)


def _answers(right: list[int], first: int = 0) -> Answers:
    correct = torch.tensor(right, dtype=torch.bool)
    return Answers(float(correct.float().mean()), torch.arange(first, first + len(right)), correct)


def test_of_one_class_is_the_binomial_error():
    answers = _answers([1] * 70 + [0] * 30)
    assert of_mean_accuracy([answers]) == pytest.approx(math.sqrt(0.7 * 0.3 / 99))
    assert of_mean_accuracy([_answers([1])]) != of_mean_accuracy([_answers([1])])  # one text says nothing


def test_classes_on_other_texts_are_independent_and_on_the_same_ones_are_not():
    right = [1] * 70 + [0] * 30
    alone = of_mean_accuracy([_answers(right)])
    assert of_mean_accuracy([_answers(right), _answers(right, 100)]) == pytest.approx(alone / math.sqrt(2), rel=0.01)
    assert of_mean_accuracy([_answers(right), _answers(right)]) == pytest.approx(alone)


def test_many_draws_of_texts_vary_as_the_errors_say():
    generator = torch.Generator().manual_seed(0)
    # each text is hard or easy, for both of its probes; the numbers of another quantity go with the first
    means, accuracy_errors, ratios, ratio_errors = [], [], [], []
    for _ in range(2000):
        easy = torch.rand(60, generator=generator)
        asked = [(torch.rand(60, generator=generator) < easy).int().tolist() for _ in range(2)]
        answers = [_answers(right) for right in asked]
        means.append(sum(of_class.accuracy for of_class in answers) / 2)
        accuracy_errors.append(of_mean_accuracy(answers))
        denominators = 2 + torch.rand(60, generator=generator)
        numerators = denominators * easy
        ratios.append(float(numerators.mean() / denominators.mean()))
        ratio_errors.append(of_ratio(numerators, denominators))
    assert torch.tensor(accuracy_errors).mean() == pytest.approx(float(torch.tensor(means).std()), rel=0.05)
    assert torch.tensor(ratio_errors).mean() == pytest.approx(float(torch.tensor(ratios).std()), rel=0.05)


def test_of_means():
    assert of_mean([1.0, 3.0]) == pytest.approx(1.0)
    assert math.isnan(of_mean([1.0]))
    assert of_mean_of_independent([0.3, 0.4]) == pytest.approx(0.25)
