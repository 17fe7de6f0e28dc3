"""Prefix lengths drawn afresh for every training step, in place of fixed level widths (Nabeshima 2024).

A latent is then not a member of a level but has a place: the earlier it stands, the more of the drawn prefixes contain
it. Source: N. Nabeshima, "Matryoshka Sparse Autoencoders", https://sparselatents.com/matryoshka.html, and its code,
https://github.com/noanabeshima/matryoshka-saes (``get_pareto_prefix_bounds`` in sae.py at commit 5aa72b1).
"""

import math
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True)
class PrefixSampling:
    """The law that prefix lengths are drawn from.

    The first length drawn is at most w with probability ((w - min_width + 1) / (d_sae - min_width)) ** pareto_power,
    for ``min_width <= w < d_sae``: a power of 1 is uniform, smaller ones favour short prefixes. Those that follow are
    drawn by the same law from the lengths that are left.

    The lengths of a step depend on the seed and the number of the step alone, so a resumed run draws the same ones.
    """

    n_prefixes: int = 10
    """How many prefixes count in a step's loss, the full dictionary being one of them. The others are drawn without
    repetition."""

    min_width: int = 1
    """The shortest length that can be drawn."""

    pareto_power: float = 0.5
    """How strongly short prefixes are favoured; 0.5 is Nabeshima's."""

    seed: int = 0
    """Another seed draws other lengths."""

    @classmethod
    def from_dict(cls, values: dict[str, Any], d_sae: int) -> "PrefixSampling":
        """Make a law from a config's mapping.

        Args:
            values: The fields of this class by name; what is missing has its default.
            d_sae: The number of latents to draw prefixes of.

        Raises:
            ValueError: If a key is unknown, or a value is out of range or leaves too few lengths to draw from.
        """
        names = [f.name for f in fields(cls)]
        if not isinstance(values, dict) or not set(values) <= set(names):
            raise ValueError(f"prefix_sampling={values!r} must be a mapping with the keys {', '.join(names)}.")
        law = cls(**values)
        for name, lowest in {"n_prefixes": 2, "min_width": 1, "seed": 0}.items():
            value = getattr(law, name)
            if isinstance(value, bool) or not isinstance(value, Integral) or value < lowest:
                raise ValueError(f"prefix_sampling.{name}={value!r} must be a whole number of at least {lowest}.")
        power = law.pareto_power
        if isinstance(power, bool) or not isinstance(power, Real) or not math.isfinite(power) or power <= 0:
            raise ValueError(f"prefix_sampling.pareto_power={power!r} must be a positive number, such as 0.5.")
        if d_sae - law.min_width < law.n_prefixes - 1:
            raise ValueError(
                f"prefix_sampling: n_prefixes={law.n_prefixes} needs {law.n_prefixes - 1} different lengths from "
                f"min_width={law.min_width} to d_sae - 1 = {d_sae - 1}; lower n_prefixes or min_width."
            )
        return law

    def probabilities(self, d_sae: int) -> Float[np.ndarray, " n_lengths"]:
        """The probability of each length from ``min_width`` to ``d_sae - 1`` to be drawn first."""
        return np.diff(np.linspace(0, 1, d_sae - self.min_width + 1) ** self.pareto_power)

    def draw(self, d_sae: int, step: int) -> list[int]:
        """The prefix lengths of training step ``step``, ascending, the last one ``d_sae``."""
        generator = np.random.default_rng((self.seed, step))
        lengths = np.arange(self.min_width, d_sae)
        drawn = generator.choice(lengths, self.n_prefixes - 1, replace=False, p=self.probabilities(d_sae))
        return [*sorted(drawn.tolist()), d_sae]
