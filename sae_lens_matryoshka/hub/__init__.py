"""Publishing Matryoshka SAEs on the Hugging Face Hub, and loading them from there or elsewhere."""

from sae_lens_matryoshka.hub.publishing import Push, push_to_hub
from sae_lens_matryoshka.saes.loading import load

__all__ = ["Push", "load", "push_to_hub"]
