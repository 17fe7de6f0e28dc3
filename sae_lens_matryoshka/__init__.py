"""Matryoshka sparse autoencoders for SAELens (Bussmann et al., ICML 2025, arXiv:2503.17547).

Importing this package registers with SAELens the architectures ``matryoshka`` (BatchTopK), ``matryoshka_topk``,
``matryoshka_jumprelu`` and ``matryoshka_standard`` for training, and their levels for inference.
"""

from importlib.metadata import version

from sae_lens_matryoshka.command_line_start import is_command_line

if not is_command_line():  # which does this itself, once it is sure to need it
    from sae_lens_matryoshka.in_model.attaching import for_transformer_lens, levels_in_model
    from sae_lens_matryoshka.levels import geometric_widths, paper_widths
    from sae_lens_matryoshka.measuring.calibration import ThresholdCalibration, calibrate_threshold
    from sae_lens_matryoshka.measuring.level_metrics import measure_levels
    from sae_lens_matryoshka.measuring.pruning import PruningFigures, measure_pruning
    from sae_lens_matryoshka.registration import register
    from sae_lens_matryoshka.run_files.reading import read_run_file
    from sae_lens_matryoshka.saes.matryoshka_batchtopk import MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig
    from sae_lens_matryoshka.saes.matryoshka_jumprelu import (
        MatryoshkaJumpReLUTrainingSAE,
        MatryoshkaJumpReLUTrainingSAEConfig,
    )
    from sae_lens_matryoshka.saes.matryoshka_sae import MatryoshkaSAE, MatryoshkaSAEConfig
    from sae_lens_matryoshka.saes.matryoshka_sae_kinds import (
        MatryoshkaJumpReLUSAE,
        MatryoshkaJumpReLUSAEConfig,
        MatryoshkaStandardSAE,
        MatryoshkaStandardSAEConfig,
        MatryoshkaTopKSAE,
        MatryoshkaTopKSAEConfig,
    )
    from sae_lens_matryoshka.saes.matryoshka_standard import (
        MatryoshkaStandardTrainingSAE,
        MatryoshkaStandardTrainingSAEConfig,
    )
    from sae_lens_matryoshka.saes.matryoshka_topk import MatryoshkaTopKTrainingSAE, MatryoshkaTopKTrainingSAEConfig
    from sae_lens_matryoshka.saes.prefix_sampling import PrefixSampling
    from sae_lens_matryoshka.saved.level_figures import LevelMetrics
    from sae_lens_matryoshka.training.caching import CacheResult, cache_activations
    from sae_lens_matryoshka.training.options import CheckpointOptions
    from sae_lens_matryoshka.training.run import TrainResult, train
    from sae_lens_matryoshka.training.trained_saes import TrainedSAE

    register()

__version__ = version("sae-lens-matryoshka")

__all__ = [
    "CacheResult",
    "CheckpointOptions",
    "LevelMetrics",
    "MatryoshkaJumpReLUSAE",
    "MatryoshkaJumpReLUSAEConfig",
    "MatryoshkaJumpReLUTrainingSAE",
    "MatryoshkaJumpReLUTrainingSAEConfig",
    "MatryoshkaSAE",
    "MatryoshkaSAEConfig",
    "MatryoshkaStandardSAE",
    "MatryoshkaStandardSAEConfig",
    "MatryoshkaStandardTrainingSAE",
    "MatryoshkaStandardTrainingSAEConfig",
    "MatryoshkaTopKSAE",
    "MatryoshkaTopKSAEConfig",
    "MatryoshkaTopKTrainingSAE",
    "MatryoshkaTopKTrainingSAEConfig",
    "MatryoshkaTrainingSAE",
    "MatryoshkaTrainingSAEConfig",
    "PrefixSampling",
    "PruningFigures",
    "ThresholdCalibration",
    "TrainResult",
    "TrainedSAE",
    "cache_activations",
    "calibrate_threshold",
    "for_transformer_lens",
    "geometric_widths",
    "levels_in_model",
    "measure_levels",
    "measure_pruning",
    "paper_widths",
    "read_run_file",
    "register",
    "train",
]
