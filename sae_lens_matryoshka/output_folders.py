"""Writing a run's output so that it is complete or absent, and nothing existing is overwritten unasked."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def staged_folder(output: Path, force: bool = False) -> Iterator[Path]:
    """A temporary folder beside ``output`` that takes its name when the block ends without an error.

    After an error the temporary folder is removed and ``output`` is as it was.

    Args:
        output: The folder to write.
        force: Whether a non-empty ``output`` may be replaced.

    Raises:
        FileExistsError: If ``output`` holds anything and ``force`` is not set.
        OSError: If the folder cannot be made.
    """
    check_output(output, force)
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        yield staging
        if output.exists():
            shutil.rmtree(output)
        staging.rename(output)
        output.chmod(0o755)  # mkdtemp makes it private
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_output(output: Path, force: bool) -> None:
    """Refuse an output folder that must not be written.

    Raises:
        FileExistsError: If ``output`` holds anything and ``force`` is not set, or is a file.
    """
    if output.is_dir():
        if any(output.iterdir()) and not force:
            raise FileExistsError(
                f"The output folder {output} is not empty; choose another with --output or replace it with --force."
            )
    elif output.exists():
        raise FileExistsError(f"The output {output} is a file; choose a folder with --output.")
