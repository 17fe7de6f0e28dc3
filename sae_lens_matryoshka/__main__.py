"""``python -m sae_lens_matryoshka`` is the command ``sae-lens-matryoshka``."""

import sys

from sae_lens_matryoshka.cli.command_line import main

sys.exit(main())
