"""How activations can be normalized before an SAE is trained on them: SAELens's words, and one of this plugin's own."""

from typing import Literal, TypeAlias

CHANNEL_STANDARDIZATION = "channel_standardization"
"""Each channel less its mean, divided by its standard deviation: SAELens's whitening with a diagonal matrix."""

COVARIANCE_WHITENING = "covariance_whitening"
"""SAELens's: all principal components are made equally large (arXiv:2511.13981)."""

NormalizeActivations: TypeAlias = Literal[
    "none", "expected_average_only_in", "layer_norm", "covariance_whitening", "channel_standardization"
]
"""What SAELens's field ``normalize_activations`` takes in a Matryoshka SAE's training config."""
