"""Matryoshka sparse autoencoders for SAELens (Bussmann et al., ICML 2025, arXiv:2503.17547).

Importing this package registers the architecture ``matryoshka`` with SAELens, for training and for inference.
"""

from importlib.metadata import version

from sae_lens_matryoshka.calibration import ThresholdCalibration, calibrate_threshold
from sae_lens_matryoshka.level_metrics import LevelMetrics, measure_levels
from sae_lens_matryoshka.levels import geometric_widths, paper_widths
from sae_lens_matryoshka.registration import register
from sae_lens_matryoshka.saes.matryoshka_sae import MatryoshkaSAE, MatryoshkaSAEConfig
from sae_lens_matryoshka.saes.matryoshka_training_config import MatryoshkaTrainingSAEConfig
from sae_lens_matryoshka.saes.matryoshka_training_sae import MatryoshkaTrainingSAE

__version__ = version("sae-lens-matryoshka")

__all__ = [
    "LevelMetrics",
    "MatryoshkaSAE",
    "MatryoshkaSAEConfig",
    "MatryoshkaTrainingSAE",
    "MatryoshkaTrainingSAEConfig",
    "ThresholdCalibration",
    "calibrate_threshold",
    "geometric_widths",
    "measure_levels",
    "paper_widths",
    "register",
]

register()
