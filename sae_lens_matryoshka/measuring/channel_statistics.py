"""Mean and standard deviation of each channel of activations, which a few extreme samples do not decide.

In language models some tokens, often the first of a text and line breaks, have activations ten times as long as all
others, in a few channels. Samples much further from the median activation than is usual are left out.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

REFERENCE_SAMPLES = 8192
"""How many samples, the first ones, say where the activations lie and how far from there is usual."""

FURTHEST = 5.0
"""A sample is left out if it lies this many times further from the median activation than half of all samples do."""


class ChannelStatistics(NamedTuple):
    """What the channels of activations are like, extreme samples left out."""

    mean: Float[Tensor, " d_in"]
    """In float64."""

    standard_deviation: Float[Tensor, " d_in"]
    """In float64, of a sample of the population (divided by n - 1)."""

    n_samples: int
    """How many samples it was computed from."""

    n_left_out: int
    """How many more were too far from the rest."""


@dataclass(frozen=True)
class UsualActivations:
    """Where activations lie, and which of them are extreme."""

    median: Float[Tensor, " d_in"]
    """The median of each channel, in float64."""

    furthest: float
    """The largest distance from it that is not extreme."""

    @staticmethod
    def of(activations: Float[Tensor, "samples d_in"]) -> "UsualActivations":
        """What is usual among some activations.

        Args:
            activations: The activations.
        """
        activations = activations.double()
        median = activations.median(0).values
        distance = (activations - median).norm(dim=-1).median().item()
        # more than half of the samples are the same: nothing is known of the others
        return UsualActivations(median, FURTHEST * distance if distance > 0 else float("inf"))

    def are_extreme(self, activations: Float[Tensor, "samples d_in"]) -> Bool[Tensor, " samples"]:
        """Which of some activations are extreme.

        Args:
            activations: The activations.
        """
        return (activations.double() - self.median.to(activations.device)).norm(dim=-1) > self.furthest


class RunningChannelStatistics:
    """The statistics of a stream of activations, exact in float64, in the memory of the first samples."""

    def __init__(self) -> None:
        self._first: list[Tensor] = []
        self._usual: UsualActivations | None = None
        self._n = self._n_left_out = 0
        self._sum = self._sum_of_squares = torch.zeros((), dtype=torch.float64)

    @torch.no_grad()
    def add(self, activations: Float[Tensor, "*batch d_in"]) -> None:
        """Count activations in.

        Args:
            activations: The activations.

        Raises:
            ValueError: If some are not finite.
        """
        activations = activations.reshape(-1, activations.shape[-1])
        if not activations.isfinite().all():
            raise ValueError(f"{int((~activations.isfinite()).sum())} values are not finite")
        if self._usual is not None:
            self._count(activations, self._usual)
            return
        self._first.append(activations.clone())
        if sum(map(len, self._first)) >= REFERENCE_SAMPLES:
            self._count_first()

    @torch.no_grad()
    def result(self) -> ChannelStatistics:
        """The statistics of what has been added.

        Raises:
            ValueError: If fewer than two samples are left.
        """
        if self._first:
            self._count_first()
        if self._usual is None or self._n < 2:
            raise ValueError(f"there are {self._n} samples to estimate from, and two at least are needed")
        variance = (self._sum_of_squares - self._sum.pow(2) / self._n) / (self._n - 1)
        mean = self._usual.median.to(self._sum.device) + self._sum / self._n
        return ChannelStatistics(mean, variance.clamp(min=0).sqrt(), self._n, self._n_left_out)

    def _count_first(self) -> None:
        first = torch.cat(self._first)
        self._first = []
        self._usual = UsualActivations.of(first)
        self._count(first, self._usual)

    def _count(self, activations: Float[Tensor, "samples d_in"], usual: UsualActivations) -> None:
        # about the median: the squares of a channel whose mean is much larger than its deviation would cancel
        kept = activations[~usual.are_extreme(activations)].double() - usual.median.to(activations.device)
        self._n += kept.shape[0]
        self._n_left_out += activations.shape[0] - kept.shape[0]
        self._sum = self._sum.to(kept.device) + kept.sum(0)
        self._sum_of_squares = self._sum_of_squares.to(kept.device) + kept.pow(2).sum(0)


def channel_statistics_reference(
    activations: Float[Tensor, "samples d_in"], n_reference: int = REFERENCE_SAMPLES
) -> ChannelStatistics:
    """The same by definition, of all activations at once.

    Args:
        activations: The activations.
        n_reference: How many of them, the first ones, say what is usual.
    """
    usual = UsualActivations.of(activations[:n_reference])
    kept = activations[~usual.are_extreme(activations)].double()
    return ChannelStatistics(kept.mean(0), kept.std(0), len(kept), len(activations) - len(kept))
