"""The folder of one run's checkpoints: written by one process at a time, and swept of what killed ones have left.

SAELens puts the checkpoints of a run into ``<checkpoint_path>/<id>/<samples trained on>``. Here a run holds a lock in
``<checkpoint_path>/<id>`` while it lasts. The system releases it however the process ends, so an unfinished checkpoint
in a folder that nobody holds is a dead process's.
"""

import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from filelock import FileLock, Timeout

from sae_lens_matryoshka.errors import UserError
from sae_lens_matryoshka.run_files.building import LanguageModelRunConfig

logger = logging.getLogger(__name__)

LOCK_FILENAME = ".lock"
_PARTIAL_SUFFIX = ".partial"


def partial_name(name: str) -> str:
    """What a checkpoint is called while it is written or removed."""
    return f".{name}{_PARTIAL_SUFFIX}"


@contextmanager
def checkpoint_folder(cfg: LanguageModelRunConfig) -> Iterator[None]:
    """Make the folder of a run's checkpoints, if there are any, and keep other processes out until the block ends.

    It is that of the run that this one resumes, else one of its own. Unfinished checkpoints there and in the folders
    beside it are removed where no process is at work. A folder without checkpoints is removed at the end.

    Args:
        cfg: The run's config; its ``checkpoint_path``, to which SAELens has added an id, is set to that of the run it
            resumes.

    Raises:
        UserError: If another process is writing there, or the folder cannot be written.
    """
    if cfg.checkpoint_path is not None and cfg.resume_from_checkpoint is not None:
        folder = Path(cfg.resume_from_checkpoint).parent
        if folder.parent.resolve() == Path(cfg.checkpoint_path).parent.resolve():
            cfg.checkpoint_path = str(folder)
    with nullcontext() if cfg.checkpoint_path is None else _run_folder(Path(cfg.checkpoint_path)):
        yield


@contextmanager
def _run_folder(path: Path) -> Iterator[None]:
    parent_existed = path.parent.exists()
    lock = FileLock(path / LOCK_FILENAME)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"Another run is writing its checkpoints to {path}; wait for it to end, or leave out --resume to start a "
            f"run of its own."
        ) from None
    except OSError as error:
        raise UserError(
            f"Checkpoints cannot be written to {path} ({error.strerror or error}); choose another folder with "
            f"--set checkpoint_path=DIR, or none with --set checkpoint_path=null."
        ) from error
    try:
        _sweep(path)
        for beside in path.parent.iterdir():
            if beside != path and beside.is_dir() and _partials(beside):
                _sweep_if_free(beside)
        yield
    finally:
        _release(lock, path)
        if not parent_existed and not any(path.parent.iterdir()):
            path.parent.rmdir()


def _partials(folder: Path) -> list[Path]:
    """What a killed process can have left: nobody else gives such names."""
    pattern = rf"\.(final_)?\d+(\.removed)?{re.escape(_PARTIAL_SUFFIX)}"
    return [path for path in folder.iterdir() if re.fullmatch(pattern, path.name) and path.is_dir()]


def _sweep_if_free(folder: Path) -> None:
    try:
        lock = FileLock(folder / LOCK_FILENAME)
        lock.acquire(timeout=0)
        _sweep(folder)
        _release(lock, folder)
    except (Timeout, OSError):
        pass  # another run's, alive or not ours to change


def _release(lock: FileLock, folder: Path) -> None:
    """Let a folder go. Its lock file stays where there are checkpoints to resume from: removed, two later runs could
    both hold a lock of that name.
    """
    if [path.name for path in folder.iterdir()] == [LOCK_FILENAME]:
        (folder / LOCK_FILENAME).unlink(missing_ok=True)
        folder.rmdir()
    lock.release()


def _sweep(folder: Path) -> None:
    for partial in _partials(folder):
        logger.info(f"Removing the unfinished checkpoint {partial}, left by a run that was killed.")
        shutil.rmtree(partial, ignore_errors=True)
