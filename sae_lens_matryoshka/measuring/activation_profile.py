"""What a model's activations are like at a hook, as far as it decides how an SAE should be trained on them.

Three kinds of samples are kept apart: at special tokens, extreme ones (much further from the median activation than is
usual, :mod:`measuring.channel_statistics`), and the ordinary rest, which all shares are of.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_matryoshka.measuring.channel_statistics import UsualActivations

DOMINATING_SHARE = 0.5
"""From which share of the variance on a channel is said to own it."""

FAR_FROM_THE_REST = 2.0
"""A position is to be left out if its median norm is this many times the others', or less than its inverse."""

LARGEST_COMPONENTS = (1, 8, 24, 64, 256)
"""Of how many principal components the share of the variance is given."""


_QUANTILES = {"median": 0.5, "1 %": 0.01, "99 %": 0.99, "largest": 1.0}


class TokenNorms(NamedTuple):
    """The samples at one token."""

    token_id: int
    n_samples: int
    """How many of its kind: special, or extreme."""

    n_occurrences: int
    """How often the token occurs in all."""

    norm: float
    """The median norm."""


class Variance(NamedTuple):
    """Where the variance of some samples lies."""

    mean_share: float
    """The squared norm of the mean as a share of the mean squared norm."""

    channels: list[tuple[int, float]]
    """The channels of most variance, each with its share, the largest first."""

    components: list[tuple[int, float]]
    """The share of the variance in so many principal components."""


@dataclass(frozen=True)
class ActivationProfile:
    """What activations are like at a hook."""

    n_samples: int
    """How many tokens, special and extreme ones included."""

    norms: dict[str, float]
    """``median``, ``1 %``, ``99 %`` and ``largest`` norm of the tokens that are not special."""

    ordinary: Variance
    """Of tokens that are neither special nor extreme."""

    with_extreme: Variance
    """Of all tokens that are not special."""

    special: list[TokenNorms]
    """Special tokens that occur, the most frequent first."""

    special_are_extreme: bool
    """Whether more than half of the samples at special tokens are extreme."""

    n_extreme: int
    """How many of the samples that are not at special tokens are extreme."""

    extreme: list[TokenNorms]
    """The tokens that they are at, the most frequent first."""

    odd_positions: list[tuple[int, float]]
    """Positions in the context whose median norm, special tokens aside, is far from the rest, and that norm."""

    @property
    def dominating_channel(self) -> tuple[int, float] | None:
        """The channel that owns the variance that a run is trained on, extreme tokens included, and its share."""
        channel, share = self.with_extreme.channels[0]
        return (channel, share) if share > DOMINATING_SHARE else None

    @property
    def first_usual_position(self) -> int:
        """How many positions at the beginning of the context are odd."""
        odd = {position for position, _ in self.odd_positions}
        return next(position for position in range(len(odd) + 1) if position not in odd)


class RunningProfile:
    """Gathers a profile from a stream, in the memory of a covariance, one batch and a norm a token.

    Args:
        special_ids: The ids of special tokens.
    """

    def __init__(self, special_ids: Collection[int]) -> None:
        self._special_ids = torch.tensor(sorted(special_ids), dtype=torch.long)
        self._usual: UsualActivations | None = None
        self._ordinary = self._extreme = _Moments(0)
        self._tokens: list[Tensor] = []
        self._norms: list[Tensor] = []

    @torch.no_grad()
    def add(self, activations: Float[Tensor, "batch context d_in"], token_ids: Int[Tensor, "batch context"]) -> None:
        """Count a batch in. The first one says which activations are usual.

        Args:
            activations: The activations, at all positions of the context.
            token_ids: The tokens that they are at.

        Raises:
            ValueError: If some activations are not finite.
        """
        if not activations.isfinite().all():
            raise ValueError(f"{int((~activations.isfinite()).sum())} values are not finite")
        positions = torch.arange(activations.shape[1]).expand(activations.shape[:2])
        x, ids = activations.reshape(-1, activations.shape[-1]).cpu().double(), token_ids.reshape(-1).cpu()
        special = torch.isin(ids, self._special_ids)
        if self._usual is None:
            self._usual = UsualActivations.of(x if special.all() else x[~special])
            self._ordinary, self._extreme = _Moments(x.shape[1]), _Moments(x.shape[1])
        extreme = self._usual.are_extreme(x)
        self._ordinary.add(x[~special & ~extreme] - self._usual.median)
        self._extreme.add(x[~special & extreme] - self._usual.median)
        self._norms.append(x.norm(dim=-1))
        self._tokens.append(torch.stack([ids, positions.reshape(-1), special.long(), extreme.long()]))

    @torch.no_grad()
    def result(self, n_channels: int = 5) -> ActivationProfile:
        """The profile of what has been added.

        Args:
            n_channels: How many channels to name.

        Raises:
            ValueError: If fewer than two ordinary samples have been added.
        """
        if self._usual is None or self._ordinary.n < 2:
            raise ValueError(f"there are {self._ordinary.n} ordinary samples to look at, and two at least are needed")
        norms, (ids, positions, special, extreme) = torch.cat(self._norms), torch.cat(self._tokens, dim=1)
        special, extreme = special.bool(), extreme.bool()
        of_text = norms[~special]
        ascending = of_text.sort().values
        return ActivationProfile(
            n_samples=norms.numel(),
            norms={name: ascending[round(share * (len(ascending) - 1))].item() for name, share in _QUANTILES.items()},
            ordinary=self._ordinary.variance(self._usual.median, n_channels),
            with_extreme=(self._ordinary + self._extreme).variance(self._usual.median, n_channels),
            special=_by_token(ids, norms, special),
            special_are_extreme=bool(special.any() and extreme[special].double().mean() > 0.5),
            n_extreme=int((extreme & ~special).sum()),
            extreme=_by_token(ids, norms, extreme & ~special),
            odd_positions=_odd_positions(positions[~special], of_text),
        )


class _Moments:
    """Sums of samples and of their products, in float64, about a point near their mean."""

    def __init__(self, d_in: int) -> None:
        self.n = 0
        self.sum = torch.zeros(d_in, dtype=torch.float64)
        self.products = torch.zeros(d_in, d_in, dtype=torch.float64)

    def add(self, x: Float[Tensor, "samples d_in"]) -> None:
        self.n += x.shape[0]
        self.sum += x.sum(0)
        self.products += x.T @ x

    def __add__(self, other: "_Moments") -> "_Moments":
        both = _Moments(self.sum.shape[0])
        both.n = self.n + other.n
        both.sum, both.products = self.sum + other.sum, self.products + other.products
        return both

    def variance(self, about: Float[Tensor, " d_in"], n_channels: int) -> Variance:
        mean = self.sum / self.n
        covariance = self.products / self.n - torch.outer(mean, mean)
        variances = covariance.diagonal().clamp(min=0)
        total = variances.sum().item() or 1.0
        second_moment = (mean + about).pow(2).sum().item()
        shares, channels = (variances / total).topk(min(n_channels, len(variances)))
        components = (torch.linalg.eigvalsh(covariance).clamp(min=0).flip(0) / total).cumsum(0)
        return Variance(
            mean_share=second_moment / (second_moment + variances.sum().item() or 1.0),
            channels=list(zip(channels.tolist(), shares.tolist(), strict=True)),
            components=[(n, components[n - 1].item()) for n in LARGEST_COMPONENTS if n <= len(components)],
        )


def _by_token(ids: Int[Tensor, " samples"], norms: Float[Tensor, " samples"], chosen: Tensor) -> list[TokenNorms]:
    """The chosen samples by the token they are at."""
    tokens, counts = ids[chosen].unique(return_counts=True)
    of_tokens = [
        TokenNorms(int(token), int(count), int((ids == token).sum()), norms[chosen & (ids == token)].median().item())
        for token, count in zip(tokens, counts, strict=True)
    ]
    return sorted(of_tokens, key=lambda token: -token.n_samples)


def _odd_positions(positions: Int[Tensor, " samples"], norms: Float[Tensor, " samples"]) -> list[tuple[int, float]]:
    """Positions whose median norm is far from the median of all others."""
    usual = norms.median().item()
    medians = [(int(position), norms[positions == position].median().item()) for position in positions.unique()]
    return [(p, m) for p, m in medians if not usual / FAR_FROM_THE_REST < m < usual * FAR_FROM_THE_REST]
