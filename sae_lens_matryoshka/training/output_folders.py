"""Writing a run's output so that it is complete or absent, and nothing is lost that was there before.

A run holds a lock on its output while it lasts, writes beside it, and takes the output's name at the end. What stood
there is moved aside first, and only removed once the new folder is in place.
"""

import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME

from sae_lens_matryoshka.errors import ConfigError, UserError, listed
from sae_lens_matryoshka.saved.level_figures import LEVELS_FILENAME
from sae_lens_matryoshka.training.resuming.manifest import MANIFEST_FILENAME
from sae_lens_matryoshka.untrusted.bounded import load_json
from sae_lens_matryoshka.untrusted.csv_tables import partial_file

logger = logging.getLogger(__name__)

MARKER_FILENAME = "sae_lens_matryoshka.json"
"""Says that a folder is a run's output, and which files the run has written there."""

SCORES_FILENAME = "scores.csv"
SCORES_FIGURE_FILENAME = "scores.png"

CALIBRATING_PREFIX = ".calibrating-"
"""Begins the names of folders that only a killed run leaves in its output."""

_CALIBRATING = re.compile(re.escape(CALIBRATING_PREFIX) + "[a-z0-9_]{8}")


def output_folder(output: str | Path) -> Path:
    """The folder that an output names, which need not be there, nor need the folders on the way to it.

    Raises:
        ConfigError: If its name leads nowhere: links in a circle, the home of nobody.
    """
    try:
        path = Path(output).expanduser()
        resolved = path.resolve()
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"The output {output} cannot be used: {error}.") from error
    return resolved if ".." in path.parts else path


@contextmanager
def staged_folder(output: Path, force: bool = False, later: Collection[str] = ()) -> Iterator[Path]:
    """A temporary folder beside ``output`` that takes its name when the block ends without an error.

    After an error ``output`` is as it was. The temporary folder is removed, unless an SAE has been saved in it: then it
    stays, and is named.

    Args:
        output: The folder to write.
        force: Whether an earlier run's output may be replaced.
        later: Files that the run will add to its output.

    Raises:
        FileExistsError: If ``output`` may not be written; see :func:`check_output`.
        UserError: If another run is writing there.
        OSError: If the folder cannot be made.
    """
    with output_lock(output):
        check_output(output, force)
        output = output.resolve()
        _sweep(output)
        staging = Path(tempfile.mkdtemp(prefix=_staging_prefix(output), dir=output.parent))
        try:
            yield staging
            _record_files(staging, later)
            check_output(output, force)
            _put_in_place(staging, output)
        finally:
            _remove_unless_trained(staging)


@contextmanager
def output_lock(output: Path) -> Iterator[None]:
    """Keep other runs away from an output while the block lasts; within it, the same process may ask again.

    Args:
        output: The folder, which need not be there.

    Raises:
        UserError: If another run is writing there, or the folder that it lies in cannot be made or written.
        FileExistsError: If it lies in the output of another run.
    """
    output = output.resolve()
    for parent in output.parents:  # before anything is made there, which another run would find in its output
        if (parent / MARKER_FILENAME).is_file() or _is_being_written(parent):
            raise FileExistsError(
                f"The output {output} lies in {parent}, the output of another run; choose a folder beside it."
            )
    lock = FileLock(_lock_file(output), is_singleton=True)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if not _lock_file(output).exists():  # which a finished run leaves as it was
            _lock_file(
                output
            ).touch()  # filelock takes some folders that nothing can be made in for a lock that is held
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"Another run is writing to {output}; choose another folder, or wait for it to end.") from None
    except OSError as error:
        file = next((parent for parent in output.parents if parent.exists() and not parent.is_dir()), None)
        why = f"{file} is a file" if file else error.strerror or error
        raise UserError(f"The output {output} cannot be made ({why}); choose another folder with --output.") from error
    try:
        yield
    finally:
        lock.release()  # the file stays: removed, two later runs could both hold a lock of that name


def _is_being_written(output: Path) -> bool:
    """Whether another run holds the lock on an output."""
    lock_file = _lock_file(output)
    if not lock_file.is_file() or not os.access(lock_file, os.W_OK):
        return False
    try:
        with FileLock(lock_file, is_singleton=True).acquire(timeout=0):
            return False
    except Timeout:
        return True


def _lock_file(output: Path) -> Path:
    return output.parent / f".{output.name}.lock"


def check_apart(output: Path, checkpoint_path: Path) -> None:
    """Refuse checkpoints inside the output, which appears as a whole.

    Raises:
        UserError: If they would lie there.
    """
    if checkpoint_path.resolve().is_relative_to(output.resolve()):
        raise UserError(
            f"checkpoint_path={str(checkpoint_path)!r} lies in the output {output}, which appears when all is trained; "
            f"name a folder beside it, such as {output.parent / 'checkpoints'}."
        )


def check_output(output: Path, force: bool, why: str | None = None) -> None:
    """Refuse an output folder that must not be written.

    Args:
        output: The folder to write.
        force: Whether an earlier run's output may be replaced.
        why: Why what is there is not what the run would write, in a few words.

    Raises:
        FileExistsError: If ``output`` is a file, a folder that other things live in, or not empty; with ``force`` if it
            holds anything that no run has written there, or other runs.
    """
    folder = output.resolve()
    working, home = Path.cwd().resolve(), Path.home().resolve()
    if folder in (working, home, *working.parents, *home.parents) or os.path.ismount(folder):
        raise FileExistsError(
            f"The output {output} is the working directory, a home, a mount point or a folder above one, which a run "
            f"cannot replace; name a new folder in it with --output."
        )
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"The output {output} is a file; choose a folder with --output.")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not force:
        raise FileExistsError(
            f"The output folder {output} is not empty{f', and {why}' if why else ''}; choose another with --output or "
            f"replace it with --force."
        )
    files = [path for path in sorted(folder.rglob("*")) if not _is_filled_folder(path)]
    marks = (MARKER_FILENAME, MANIFEST_FILENAME)
    runs = [path.parent for path in files if path.name in marks and path.parent != folder]
    if runs:
        raise FileExistsError(
            f"The output folder {output} holds other runs or their checkpoints ({_listed(runs, folder)}), which "
            f"--force would remove; choose another folder."
        )
    recorded = _recorded_files(folder)
    if recorded is None:
        raise FileExistsError(
            f"The output folder {output} is not one that this version has written (no {MARKER_FILENAME}), and --force "
            f"replaces no other; choose another, or remove it yourself."
        )
    foreign = [
        path for path in files
        if str(path.relative_to(folder)) not in recorded
        and not any(_CALIBRATING.fullmatch(part) for part in path.relative_to(folder).parts)
    ]  # fmt: skip
    if foreign:
        raise FileExistsError(
            f"The output folder {output} holds what no run has written ({_listed(foreign, folder)}); move it away, or "
            f"choose another folder."
        )


def _is_filled_folder(path: Path) -> bool:
    """Whether it is of no account by itself, since what is in it counts; an empty folder and a link are somebody's."""
    return path.is_dir() and not path.is_symlink() and any(path.iterdir())


def _record_files(staging: Path, later: Collection[str]) -> None:
    """Note which files are the run's, those that calibrating and measuring will add among them."""
    written = [path for path in staging.rglob("*") if path.is_file()]
    added = [path.parent / LEVELS_FILENAME for path in written if path.name == SAE_CFG_FILENAME]
    added += [staging / name for name in later]
    partial = [partial_file(path) for path in added]
    files = sorted({str(path.relative_to(staging)) for path in (*written, *added, *partial, staging / MARKER_FILENAME)})
    contents = {"note": "written by sae-lens-matryoshka train; --force replaces these files", "files": files}
    (staging / MARKER_FILENAME).write_text(json.dumps(contents, indent=1), encoding="utf-8")


def _recorded_files(output: Path) -> set[str] | None:
    try:
        return set(load_json((output / MARKER_FILENAME).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _put_in_place(staging: Path, output: Path) -> None:
    staging.chmod(0o755)  # mkdtemp makes it private
    if not output.exists():
        staging.rename(output)
        return
    aside = Path(tempfile.mkdtemp(prefix=_staging_prefix(output), dir=output.parent)) / output.name
    output.rename(aside)
    try:
        staging.rename(output)
    except BaseException:
        aside.rename(output)
        raise
    finally:
        if output.exists():
            shutil.rmtree(aside.parent, ignore_errors=True)


def _staging_prefix(output: Path) -> str:
    return f".{output.name}.unfinished-"


def _sweep(output: Path) -> None:
    """Remove what killed runs have left beside an output; the lock on it is held."""
    for left in output.parent.iterdir():
        ours = left.name.startswith(_staging_prefix(output)) and re.fullmatch(r".*-[a-z0-9_]{8}", left.name)
        if ours and left.is_dir() and not left.is_symlink():
            _remove_unless_trained(left)


def _remove_unless_trained(staging: Path) -> None:
    if not staging.exists():
        return
    if any(staging.rglob(SAE_WEIGHTS_FILENAME)):
        logger.warning(f"What a run has trained is kept in {staging}; move it where you want it, or remove it.")
    else:
        shutil.rmtree(staging, ignore_errors=True)


def _listed(paths: list[Path], folder: Path) -> str:
    return listed(list(dict.fromkeys(str(path.relative_to(folder)) for path in paths)), 3)
