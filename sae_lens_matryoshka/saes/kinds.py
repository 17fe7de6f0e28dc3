"""Which class gives the levels back to an SAE, by the SAELens architecture that it is saved as."""

from typing import Any

KINDS: dict[str, tuple[type[Any], type[Any]]] = {}
"""The class and config class for each architecture; ``matryoshka_sae_kinds.py`` enters them."""
