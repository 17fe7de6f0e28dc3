"""Which class gives the levels back to an SAE, by the SAELens architecture that it is saved as."""

from collections.abc import Callable
from typing import Any, TypeVar

from sae_lens import SAE

KINDS: dict[str, tuple[type[Any], type[Any]]] = {}
"""The class and config class for each architecture; a kind enters itself."""

Kind = TypeVar("Kind", bound=type[SAE[Any]])


def enter_kind(config_class: type[Any]) -> Callable[[Kind], Kind]:
    """A decorator for the subclass of :class:`MatryoshkaSAE` for one SAELens architecture.

    Args:
        config_class: Its config class.
    """

    def enter(kind: Kind) -> Kind:
        KINDS[kind.saved_architecture()] = (kind, config_class)  # type: ignore[attr-defined]
        return kind

    return enter
