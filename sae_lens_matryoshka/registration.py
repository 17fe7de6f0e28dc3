"""Making ``matryoshka`` known to SAELens, which has no plugin discovery of its own: importing the package does it."""

from typing import Any

from sae_lens import register_sae_class, register_sae_training_class
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

from sae_lens_matryoshka.saes.matryoshka_sae import MatryoshkaSAE, MatryoshkaSAEConfig
from sae_lens_matryoshka.saes.matryoshka_training_config import MatryoshkaTrainingSAEConfig
from sae_lens_matryoshka.saes.matryoshka_training_sae import MatryoshkaTrainingSAE


def register() -> None:
    """Enter our classes in SAELens's inference and training registries. Repeating it changes nothing.

    Raises:
        RuntimeError: If another package has already registered one of our architecture names. Neither registry is
            changed then.
    """
    inference = MatryoshkaSAEConfig.architecture()
    training = MatryoshkaTrainingSAEConfig.architecture()
    _check_not_foreign(SAE_CLASS_REGISTRY, inference, MatryoshkaSAE)
    _check_not_foreign(SAE_TRAINING_CLASS_REGISTRY, training, MatryoshkaTrainingSAE)
    # an older copy of our own classes, left by a reload, gives way to the current one
    SAE_CLASS_REGISTRY.pop(inference, None)
    SAE_TRAINING_CLASS_REGISTRY.pop(training, None)
    register_sae_class(inference, MatryoshkaSAE, MatryoshkaSAEConfig)
    register_sae_training_class(training, MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig)


def _check_not_foreign(registry: dict[str, tuple[Any, Any]], architecture: str, our_class: type) -> None:
    if architecture not in registry:
        return
    registered = registry[architecture][0]
    if (registered.__module__, registered.__qualname__) != (our_class.__module__, our_class.__qualname__):
        raise RuntimeError(
            f"SAELens's architecture {architecture!r} is already registered by "
            f"{registered.__module__}.{registered.__qualname__}, so sae_lens_matryoshka cannot register its own; "
            f"import only one of the two packages in a process."
        )
