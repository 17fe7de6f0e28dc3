"""``saelens``: SAELens's own training command, which finds our architectures in its registry."""

import argparse
import runpy
import sys
import warnings
from typing import Any

from sae_lens_matryoshka.cli.loading import load_saelens


def add_to(commands: Any) -> None:
    """Add the command to the parser's."""
    commands.add_parser(
        "saelens", add_help=False, help="SAELens's own training command, with the architecture 'matryoshka' registered"
    ).set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Run SAELens's command with the arguments that are left."""
    load_saelens()
    warnings.filterwarnings("ignore", message=".*found in sys.modules", category=RuntimeWarning)  # runpy's, harmless
    sys.argv = ["sae-lens-matryoshka saelens", *options.rest]
    runpy.run_module("sae_lens.llm_sae_training_runner", run_name="__main__")
