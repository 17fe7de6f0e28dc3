"""The code blocks of the README, the commands in them, and running a block of Python."""

import re
import shlex
from pathlib import Path

from tests import processes

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS: list[tuple[str, str]] = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    """The plugin's commands in the README's shell blocks, continued lines joined, installation left out."""
    shell = "\n".join(code for language, code in BLOCKS if language == "bash").replace("\\\n", " ")
    parts = [part.strip() for line in shell.splitlines() for part in line.split("&&")]
    return [
        shlex.split(command.replace(".venv/bin/", ""))[1:]
        for command in parts
        if command.replace(".venv/bin/", "").startswith("sae-lens-matryoshka")
    ]


def python_blocks(*texts: str) -> list[str]:
    """The blocks of Python that hold one of some texts."""
    return [code for language, code in BLOCKS if language == "python" and any(text in code for text in texts)]


def run_block(code: str, folder: Path, tinystories: Path | None = None) -> str:
    """What a block of Python prints in a process of its own."""
    done = processes.run(code, folder, None if tinystories is None else {"TINYSTORIES": str(tinystories)})
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
