"""What our results say beyond SAEBench's schema, which lets a result hold anything in ``eval_result_unstructured``."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

BEYOND = "sae_lens_matryoshka"
"""Where ``eval_result_unstructured`` holds it."""


@dataclass(frozen=True)
class Beyond:
    """Metrics that are not SAEBench's, and how sure those are that are."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    """Further metrics."""

    standard_errors: Mapping[str, float] = field(default_factory=dict)
    """Metric, SAEBench's or a further one -> its standard error; one that is not known may be NaN."""

    details: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else there is to say, as JSON can hold it."""

    def added_to(self, unstructured: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What SAEBench itself puts there, and this.

        Args:
            unstructured: SAEBench's ``eval_result_unstructured``.
        """
        known = {metric: error for metric, error in self.standard_errors.items() if math.isfinite(error)}
        beyond = {"metrics": dict(self.metrics), "standard_errors": known, "details": dict(self.details)}
        return {**(unstructured or {}), BEYOND: beyond}

    @classmethod
    def of(cls, unstructured: Mapping[str, Any] | None) -> "Beyond":
        """What a result says; nothing for one that SAEBench itself has written.

        Args:
            unstructured: The result's ``eval_result_unstructured``.
        """
        return cls(**((unstructured or {}).get(BEYOND) or {}))
