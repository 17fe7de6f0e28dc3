"""Child processes of the command line and of code, without the seconds that importing SAELens takes in each.

They are forked from a server that has imported other people's packages and nothing of this one: processes of their own,
with their own folder, environment and output, that can be killed and interrupted. What is about start-up itself, or
about variables that those packages read when they are imported, is for ``subprocess``.
"""

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["sae_lens", "matplotlib.pyplot"])


def start(
    program: Sequence[str] | str, folder: Path, output: Path, environment: Mapping[str, str] | None = None
) -> BaseProcess:
    """Start a process; its ``exitcode`` is minus the signal's number if a signal has ended it.

    Args:
        program: Arguments of the command line, or Python code.
        folder: Its working directory.
        output: The folder in which it writes its output, to the files ``stdout`` and ``stderr``.
        environment: Variables to set besides those of this process.
    """
    variables = {**os.environ, **(environment or {})}
    process = _SERVER.Process(target=_become, args=(program, folder, output, variables))
    process.start()
    return process


def run(
    program: Sequence[str] | str, folder: Path, environment: Mapping[str, str] | None = None
) -> CompletedProcess[str]:
    """Run a process to its end; for the arguments see :func:`start`.

    Returns:
        Exit code and output, as :func:`subprocess.run` gives them.
    """
    with tempfile.TemporaryDirectory() as output:
        process = start(program, folder, Path(output), environment)
        process.join()
        stdout, stderr = ((Path(output) / name).read_text(encoding="utf-8") for name in ("stdout", "stderr"))
    assert process.exitcode is not None
    return CompletedProcess(program, process.exitcode, stdout, stderr)


def _become(program: Sequence[str] | str, folder: Path, output: Path, variables: dict[str, str]) -> None:
    """What the forked process does: give itself what a new process has, and run the program."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(output / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    if isinstance(program, str):
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
    else:
        from sae_lens_matryoshka.cli.command_line import main

        sys.exit(main(program))
