"""How far scores would move on another draw of texts, sequences or letters: their standard errors.

What is not known, such as the error over one data set, is NaN and left out of results.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Answers:
    """How the probe of one class did on its test texts."""

    accuracy: float
    """As SAEBench computes it."""

    texts: Int[Tensor, " answers"]
    """Which texts they were, numbered over all classes: a text may be asked about for several of them."""

    right: Bool[Tensor, " answers"]
    """Whether the probe was right."""


def of_mean(values: Float[Tensor, " n"] | Sequence[float]) -> float:
    """The standard error of the mean of independent values; NaN for fewer than two.

    Args:
        values: The values.
    """
    values = torch.as_tensor(values, dtype=torch.float64)
    return math.nan if len(values) < 2 else float(values.std() / math.sqrt(len(values)))


def of_ratio(numerators: Float[Tensor, " n"], denominators: Float[Tensor, " n"]) -> float:
    """The standard error of the ratio of two means over the same independent sequences, to first order.

    Args:
        numerators: A value a sequence.
        denominators: Another value of the same sequences.
    """
    numerators, denominators = numerators.double(), denominators.double()
    ratio = numerators.mean() / denominators.mean()
    return of_mean((numerators - ratio * denominators) / denominators.mean())


def of_mean_accuracy(answers: Sequence[Answers]) -> float:
    """The standard error of the mean accuracy of several classes' probes, over test texts.

    A text on which several probes were asked counts as one draw, so that their errors need not be independent. For
    one class it is the binomial error, but for n - 1 in place of n.

    Args:
        answers: Those of each class of a data set.
    """
    moves = torch.zeros(1 + max(int(of_class.texts.max()) for of_class in answers), dtype=torch.float64)
    asked = torch.zeros_like(moves, dtype=torch.bool)
    for of_class in answers:
        right, texts = of_class.right.double().cpu(), of_class.texts.cpu()
        moves.index_add_(0, texts, (right - right.mean()) / (len(right) * len(answers)))
        asked[texts] = True
    n = int(asked.sum())
    return math.nan if n < 2 else float(moves.square().sum().mul(n / (n - 1)).sqrt())


def of_mean_of_independent(errors: Sequence[float]) -> float:
    """The standard error of the mean of independent scores from their own, as of several data sets.

    Args:
        errors: The standard error of each.
    """
    return math.sqrt(sum(error**2 for error in errors)) / len(errors)
