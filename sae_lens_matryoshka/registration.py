"""Making our architectures known to SAELens, which has no plugin discovery: importing the package does it."""

from typing import Any

from sae_lens import SAE, TrainingSAE, register_sae_class, register_sae_training_class
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

from sae_lens_matryoshka.saes import matryoshka_sae_kinds  # noqa: F401 enters the kinds of Matryoshka SAEs
from sae_lens_matryoshka.saes.kinds import KINDS
from sae_lens_matryoshka.saes.matryoshka_batchtopk import MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig
from sae_lens_matryoshka.saes.matryoshka_jumprelu import (
    MatryoshkaJumpReLUTrainingSAE,
    MatryoshkaJumpReLUTrainingSAEConfig,
)
from sae_lens_matryoshka.saes.matryoshka_standard import (
    MatryoshkaStandardTrainingSAE,
    MatryoshkaStandardTrainingSAEConfig,
)
from sae_lens_matryoshka.saes.matryoshka_topk import MatryoshkaTopKTrainingSAE, MatryoshkaTopKTrainingSAEConfig

TRAINING_CLASSES: list[tuple[type[TrainingSAE[Any]], type[Any]]] = [
    (MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig),
    (MatryoshkaTopKTrainingSAE, MatryoshkaTopKTrainingSAEConfig),
    (MatryoshkaJumpReLUTrainingSAE, MatryoshkaJumpReLUTrainingSAEConfig),
    (MatryoshkaStandardTrainingSAE, MatryoshkaStandardTrainingSAEConfig),
]
"""Our architectures for training."""

INFERENCE_CLASSES: list[tuple[type[SAE[Any]], type[Any]]] = list(KINDS.values())
"""Our architectures for inference: what SAEs become once they have levels."""


def register() -> None:
    """Enter our classes in SAELens's inference and training registries. Repeating it changes nothing.

    Raises:
        RuntimeError: If another package has already registered one of our architecture names. Neither registry is
            changed then.
    """
    registries = ((SAE_TRAINING_CLASS_REGISTRY, TRAINING_CLASSES), (SAE_CLASS_REGISTRY, INFERENCE_CLASSES))
    for registry, classes in registries:
        for sae_class, config_class in classes:
            architecture = config_class.architecture()
            registered, _ = registry.get(architecture, (sae_class, None))
            if (registered.__module__, registered.__qualname__) != (sae_class.__module__, sae_class.__qualname__):
                raise RuntimeError(
                    f"SAELens's architecture {architecture!r} is already registered by "
                    f"{registered.__module__}.{registered.__qualname__}, so sae_lens_matryoshka cannot register its "
                    f"own; import only one of the two packages in a process."
                )
    for registry, classes in registries:
        for _, config_class in classes:
            # an older copy of our own classes, left by a reload, gives way to the current one
            registry.pop(config_class.architecture(), None)
    for sae_class, config_class in INFERENCE_CLASSES:
        register_sae_class(config_class.architecture(), sae_class, config_class)
    for sae_class, config_class in TRAINING_CLASSES:
        register_sae_training_class(config_class.architecture(), sae_class, config_class)
