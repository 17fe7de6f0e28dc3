"""Parsing the command line, running the command it names, and what is said when that fails."""

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version

from sae_lens_matryoshka.cli import cache, evaluate, inspect, look_at_activations, push, saelens, train
from sae_lens_matryoshka.cli.loading import load_saelens
from sae_lens_matryoshka.cli.progress import PROGRESS_BARS
from sae_lens_matryoshka.errors import REPORT_BUG, UserError
from sae_lens_matryoshka.saelens_fields import table_is_current
from sae_lens_matryoshka.untrusted.terminal import printable


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 1 or 2 the user can mend it, 130 interrupted.

    Args:
        arguments: The arguments after the program's name; None takes those of the process, which is then to end.
    """
    if arguments is not None:
        return _run(arguments)
    code = 130
    with suppress(KeyboardInterrupt):  # a second one, while the first is seen to
        code = _run(sys.argv[1:])
    # what torch and others do when a process ends would make a traceback of one more
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(code))
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    return code


def _run(arguments: Sequence[str]) -> int:
    try:
        options = _parse(list(arguments))
        if not table_is_current():
            load_saelens()
        options.run(options)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    except (UserError, OSError) as error:
        print(printable(f"error: {' '.join(str(error).split())}"), file=sys.stderr)
        return 1
    except Exception:
        print(printable(traceback.format_exc()), file=sys.stderr)
        print(f"error: {REPORT_BUG}", file=sys.stderr)
        return 1
    finally:
        PROGRESS_BARS.stop()
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="sae-lens-matryoshka", description="Matryoshka SAEs for SAELens.")
    parser.add_argument("--version", action="version", version=version("sae-lens-matryoshka"))
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (train, cache, look_at_activations, inspect, push, evaluate, saelens):
        command.add_to(commands)
    options, rest = parser.parse_known_args(evaluate.join_negative_levels(arguments))
    if rest and options.command != "saelens":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.rest = rest
    return options
