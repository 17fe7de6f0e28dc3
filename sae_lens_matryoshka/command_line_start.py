"""Whether this process is the command line."""

import sys
from pathlib import Path


def is_command_line() -> bool:
    """Whether this process is ``sae-lens-matryoshka`` or ``python -m sae_lens_matryoshka``.

    The command line imports torch and SAELens only where it needs them, so that a mistake in its arguments or in a run
    file is told at once and not after ten seconds. Everybody else imports the package to have its architectures
    registered with SAELens, which imports both.
    """
    if Path(sys.argv[0]).stem == "sae-lens-matryoshka":
        return True
    # while Python looks for the module of -m, it imports the package and has "-m" in the place of the program's name
    is_module = sys.argv[0] == "-m" and "-m" in sys.orig_argv
    return is_module and sys.orig_argv[sys.orig_argv.index("-m") + 1] == "sae_lens_matryoshka"
