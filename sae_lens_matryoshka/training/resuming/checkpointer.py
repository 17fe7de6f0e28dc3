"""Checkpoints that are complete or absent, also when a run is interrupted, the disk is full or the data break off.

SAELens's trainers decide when to save and what. Here it is done under another name first and renamed when everything is
on disk, so whatever carries a checkpoint's name is one.
"""

import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from sae_lens import SAETrainer
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from safetensors import SafetensorError
from torch.linalg import LinAlgError  # pyright: ignore[reportAttributeAccessIssue]

from sae_lens_matryoshka.errors import UserError, first_line
from sae_lens_matryoshka.training.options import CheckpointOptions
from sae_lens_matryoshka.training.resuming.manifest import find_damage, flush_folder, write_manifest
from sae_lens_matryoshka.training.resuming.run_folder import partial_name

logger = logging.getLogger(__name__)


class Checkpointer:
    """Takes over a trainer's ``save_checkpoint``, and the signals that ask a process to stop.

    Args:
        trainer: A trainer that is about to train; a state to resume from has been loaded.
        options: How many checkpoints to keep.
        resumed_from: The checkpoint that has been loaded, if any.
    """

    def __init__(
        self,
        trainer: "SAETrainer[Any, Any] | MultiSAETrainer",
        options: CheckpointOptions,
        resumed_from: str | None = None,
    ) -> None:
        self.trainer = trainer
        self.options = options
        self.folder = None if trainer.cfg.checkpoint_path is None else Path(trainer.cfg.checkpoint_path)
        self.last_checkpoint = None if resumed_from is None else Path(resumed_from)
        self._interrupted = False
        self._n_samples_before = trainer.n_training_samples
        self._save_as_saelens_does = trainer.save_checkpoint
        if self.folder is not None:
            trainer.save_checkpoint = self.save
        # SAELens would make the checkpoints that a resumed run has passed once more
        trainer.checkpoint_thresholds = [n for n in trainer.checkpoint_thresholds if n >= trainer.n_training_samples]

    def save(self, checkpoint_name: str, *saelens_arguments: Any, **saelens_options: Any) -> None:
        """Save what SAELens saves, complete or not at all.

        Args:
            checkpoint_name: The name of the folder to write.
            *saelens_arguments: What else SAELens's ``save_checkpoint`` takes,
            **saelens_options: also by name.

        Raises:
            UserError: If the checkpoint cannot be written. Earlier ones are as they were.
            KeyboardInterrupt: If the process has been asked to stop, after saving.
        """
        assert self.folder is not None
        started = time.perf_counter()
        partial, checkpoint = self.folder / partial_name(checkpoint_name), self.folder / checkpoint_name
        try:
            with self._finished_step_counted(checkpoint_name):
                self._save_as_saelens_does(partial.name, *saelens_arguments, **saelens_options)
            n_bytes = write_manifest(partial)
            _remove(checkpoint)  # damaged, or a resumed run would not pass it again
            partial.rename(checkpoint)
            flush_folder(self.folder)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch.save raises RuntimeError when a disk is full
            shutil.rmtree(partial, ignore_errors=True)
            megabytes = shutil.disk_usage(self.folder).free / 1e6
            raise UserError(
                f"The checkpoint {checkpoint} could not be written ({first_line(error)}); {megabytes:,.1f} MB are free"
            ) from error
        self.last_checkpoint = checkpoint
        logger.info(f"Checkpoint {checkpoint}: {n_bytes / 1e6:.1f} MB in {time.perf_counter() - started:.2f} s")
        self._remove_old()
        if self._interrupted:
            logger.warning(f"Interrupted; continue with --resume auto or --resume {checkpoint}")
            raise KeyboardInterrupt

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While the block trains, save a checkpoint on Ctrl-C or SIGTERM, and say of an error what it left.

        Raises:
            UserError: If training stops because of a file, a data set or numbers that are not finite.
            KeyboardInterrupt: On Ctrl-C or SIGTERM, once the step in hand is finished and saved, or at once if there is
                no ``checkpoint_path``, nothing has been trained yet (the norm of activations is estimated first, which
                takes its time), or it is the second.
        """
        previous = {number: signal.signal(number, self._interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        except (OSError, ValueError, LinAlgError) as error:  # a vanished file; numbers that are not finite; our own
            raise UserError(f"{first_line(error)}; {self._what_stands()}.") from error
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _interrupt(self, signal_number: int, frame: FrameType | None) -> None:
        nothing_to_save = self.folder is None or self.trainer.n_training_samples == self._n_samples_before
        if nothing_to_save or self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True
        # a threshold that is always passed: the trainer saves at the end of this step, when its state is consistent
        self.trainer.checkpoint_thresholds.insert(0, -1)
        # print and logging may be in the middle of a line of their own
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, b"\nSaving a checkpoint; once more stops at once.\n")

    @contextmanager
    def _finished_step_counted(self, checkpoint_name: str) -> Iterator[None]:
        """SAELens's trainers save a finished step before they count it: resumed, they would be one behind."""
        trainers = list(self.trainer.trainers.values()) if isinstance(self.trainer, MultiSAETrainer) else [self.trainer]
        one_more = 0 if checkpoint_name.startswith("final_") else 1
        for trainer in trainers:
            trainer.n_training_steps += one_more
        try:
            yield
        finally:
            for trainer in trainers:
                trainer.n_training_steps -= one_more

    def _remove_old(self) -> None:
        if self.folder is None or self.options.keep is None:
            return
        # by age: resumed from an older checkpoint, a run writes lower numbers than are there; damaged ones are none
        numbered = [path for path in self.folder.iterdir() if path.name.isdecimal()]
        checkpoints = [path for path in numbered if find_damage(path, read_contents=False) is None]
        for path in sorted(checkpoints, key=lambda path: path.stat().st_mtime_ns)[: -self.options.keep]:
            _remove(path)

    def _what_stands(self) -> str:
        if self.last_checkpoint is None:
            return "this run has made no checkpoint" if self.folder is not None else "checkpoint_path is not set"
        return f"the last checkpoint is {self.last_checkpoint}, continue from it with --resume auto"


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint so that what a kill leaves of it does not look like one."""
    if checkpoint.exists():
        removed = checkpoint.with_name(partial_name(f"{checkpoint.name}.removed"))
        shutil.rmtree(removed, ignore_errors=True)
        checkpoint.rename(removed)
        shutil.rmtree(removed)
