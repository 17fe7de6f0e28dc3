"""What takes long to import is imported when everything that can be checked without it has been checked."""

import sys


def load_saelens() -> None:
    """Import torch and SAELens and register our architectures, saying so meanwhile: it takes some ten seconds."""
    if "sae_lens" not in sys.modules:
        print("Loading PyTorch and SAELens ...", file=sys.stderr, flush=True)
    from sae_lens_matryoshka.registration import register

    register()
