"""What takes long to import is imported when everything that can be checked without it has been checked."""

import sys

from sae_lens_matryoshka.cli.progress import PROGRESS_BARS


def load_saelens() -> None:
    """Import torch and SAELens, saying so meanwhile (some ten seconds), register our architectures, show progress."""
    if "sae_lens" not in sys.modules:
        print("Loading PyTorch and SAELens ...", file=sys.stderr, flush=True)
    from sae_lens_matryoshka.registration import register

    register()
    PROGRESS_BARS.start()
