"""The folder of one run's checkpoints: written by one process at a time, and swept of what killed ones have left.

SAELens puts the checkpoints of a run into ``<checkpoint_path>/<id>/<samples trained on>``. Here a run holds a lock in
``<checkpoint_path>/<id>`` while it lasts. The system releases it however the process ends, so an unfinished checkpoint
in a folder that nobody holds is a dead process's.
"""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from sae_lens import LanguageModelSAERunnerConfig, MultiSAETrainingRunnerConfig

from sae_lens_matryoshka.errors import UserError

logger = logging.getLogger(__name__)

LOCK_FILENAME = ".lock"
_PARTIAL_SUFFIX = ".partial"


def partial_name(name: str) -> str:
    """What a checkpoint is called while it is written or removed."""
    return f".{name}{_PARTIAL_SUFFIX}"


@contextmanager
def checkpoint_folder(cfg: "LanguageModelSAERunnerConfig[Any] | MultiSAETrainingRunnerConfig") -> Iterator[None]:
    """This run's :func:`run_folder`: that of the run it resumes, else one of its own. None without checkpoints.

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
    with nullcontext() if cfg.checkpoint_path is None else run_folder(Path(cfg.checkpoint_path)):
        yield


@contextmanager
def run_folder(path: Path) -> Iterator[None]:
    """Make the folder of a run's checkpoints and keep other processes out of it until the block ends.

    Unfinished checkpoints there and in the folders beside it are removed where no process is at work. A folder without
    checkpoints is removed at the end.

    Raises:
        UserError: If another process is writing there, or the folder cannot be written.
    """
    existed = [folder for folder in (path, path.parent) if folder.exists()]
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
        lock.release()
        (path / LOCK_FILENAME).unlink(missing_ok=True)
        for folder in (path, path.parent):
            if folder not in existed and not any(folder.iterdir()):
                folder.rmdir()


def _partials(folder: Path) -> list[Path]:
    return [path for path in folder.glob(f".*{_PARTIAL_SUFFIX}") if path.is_dir()]


def _sweep_if_free(folder: Path) -> None:
    try:
        with FileLock(folder / LOCK_FILENAME, timeout=0):
            _sweep(folder)
            (folder / LOCK_FILENAME).unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()
    except (Timeout, OSError):
        pass  # another run's, alive or not ours to change


def _sweep(folder: Path) -> None:
    for partial in _partials(folder):
        logger.info(f"Removing the unfinished checkpoint {partial}, left by a run that was killed.")
        shutil.rmtree(partial, ignore_errors=True)
