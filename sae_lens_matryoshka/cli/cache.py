"""``cache``: the activations that a run file reads, written to a folder that any number of SAEs is trained from."""

import argparse
from typing import Any

from sae_lens_matryoshka.cli.arguments import add_run_file_arguments, positive_count
from sae_lens_matryoshka.cli.loading import load_saelens
from sae_lens_matryoshka.cli.progress import progress_messages
from sae_lens_matryoshka.run_files.checking import check_run_file
from sae_lens_matryoshka.run_files.reading import read_run_file
from sae_lens_matryoshka.untrusted.terminal import PlainConsole


def add_to(commands: Any) -> None:
    """Add the command to the parser's."""
    parser = commands.add_parser(
        "cache",
        help="write the activations that a run reads to disk, for train --activations",
        description="Write the activations that a run reads to disk. An unfinished cache is gone on with.",
    )
    parser.add_argument("config", metavar="RUN", help="a YAML file, or the name of an embedded one")
    add_run_file_arguments(parser)
    parser.add_argument("--output", metavar="DIR", required=True, help="folder to write")
    parser.add_argument(
        "--tokens", type=positive_count, metavar="N",
        help="activations to cache (default: the run's training_tokens); the cache ends where the text does",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="type to keep them in (default: bfloat16)"
    )
    parser.add_argument(
        "--shard-mb", type=positive_count, metavar="MB",
        help="size of a file; a kill costs one at most (default: 128, or more where that makes over 256 files)",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Cache and say what there is.

    Raises:
        UserError: If something cannot be used or done.
    """
    run_file = read_run_file(options.config, options.settings, options.unset)
    check_run_file(run_file, options.trust_remote_code)
    load_saelens()
    from sae_lens_matryoshka.training.caching import cache_activations

    with progress_messages():
        result = cache_activations(
            run_file,
            output=options.output,
            tokens=options.tokens,
            dtype=options.dtype,
            shard_bytes=None if options.shard_mb is None else options.shard_mb * 2**20,
            trust_remote_code=options.trust_remote_code,
        )
    done = "Already done, every checksum as it was:" if result.was_finished else "Cached"
    PlainConsole().print(
        f"{done} {result.n_rows:,} activations in {result.folder}; train from them with train RUN --activations "
        f"{result.folder}",
        soft_wrap=True,
    )
