"""An activation cache as training sees it: checked, split into what is trained on and what is held out, read by row."""

import logging
import os
import random
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from sae_lens_matryoshka.activation_cache.made_from import differences, made_from
from sae_lens_matryoshka.activation_cache.manifest import DTYPES, Manifest, read_manifest, shard_path
from sae_lens_matryoshka.activation_cache.shards import KEPT, TOKENS, MappedShard, check_shard
from sae_lens_matryoshka.errors import UserError
from sae_lens_matryoshka.run_files.building import LanguageModelRunConfig
from sae_lens_matryoshka.saved.fingerprints import content_hash, file_hash

logger = logging.getLogger(__name__)

HELD_OUT_SHARE, MOST_HELD_OUT = 0.05, 200_000
"""The share of a cache that no run trains on, and how many activations it is at most."""

COMPARED_BYTES = 4 * 2**30
"""How many bytes are compared with their checksums when a cache is opened: some seconds. ``cache`` compares all."""

READERS = 4
"""Threads that read a batch: a disk answers several questions at a time."""


class ActivationCache:
    """The activations of a language model in a folder, which are mapped and not loaded.

    Args:
        folder: The folder.
        compared_bytes: How many bytes to compare with their checksums, in shards chosen at random.

    Raises:
        UserError: If there is no cache, it is not finished, or a shard is missing, cut off or changed.
    """

    def __init__(self, folder: Path, compared_bytes: float = COMPARED_BYTES) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        if not self.manifest.finished:
            raise UserError(
                f"The activation cache {folder} is unfinished, with {self.manifest.n_rows:,} of "
                f"{self.manifest.n_wanted:,} activations; the command that began it goes on with it: "
                f"sae-lens-matryoshka cache RUN --output {folder}."
            )
        check_shards(folder, self.manifest, compared_bytes)
        is_large = sum(shard.n_bytes for shard in self.manifest.shards) > _memory_bytes() / 2
        self._shards = [MappedShard(shard_path(folder, n), is_large) for n in range(len(self.manifest.shards))]
        self._ends = torch.tensor(list(accumulate(shard.n_rows for shard in self.manifest.shards)))
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="activations")

    @property
    def n_rows(self) -> int:
        """Activations in it."""
        return self.manifest.n_rows

    @property
    def fingerprint(self) -> str:
        """A name for its contents."""
        return content_hash([[shard.n_rows, shard.xxh3_128] for shard in self.manifest.shards])

    @property
    def block(self) -> int:
        """How many consecutive activations are held out, or not, together: as many as a context has tokens."""
        return int(self.manifest.made_from["context_size"])

    @cached_property
    def held_out_blocks(self) -> Int[Tensor, " blocks"]:
        """The blocks that no run trains on, the same for every run, in random order."""
        n_blocks = self.n_rows // self.block  # what is left at the end is no whole block, and is trained on
        n_held_out = min(round(HELD_OUT_SHARE * n_blocks), MOST_HELD_OUT // self.block)
        if n_blocks < 2:
            raise UserError(
                f"The activation cache {self.folder} has {self.n_rows} activations, fewer than two blocks of "
                f"context_size={self.block} of which one could be held out; cache more."
            )
        return torch.randperm(n_blocks, generator=torch.Generator().manual_seed(0))[: max(1, n_held_out)]

    @cached_property
    def _training_blocks(self) -> Int[Tensor, " blocks"]:
        is_trained_on = torch.ones(-(-self.n_rows // self.block), dtype=torch.bool)
        is_trained_on[self.held_out_blocks] = False
        return is_trained_on.nonzero().squeeze(1)

    @property
    def n_held_out(self) -> int:
        return len(self.held_out_blocks) * self.block

    @property
    def n_training(self) -> int:
        return self.n_rows - self.n_held_out

    def training_rows(self, numbers: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """The rows of the cache that are trained on, by their numbers from 0 to ``n_training - 1``."""
        return self._training_blocks[numbers // self.block] * self.block + numbers % self.block

    def held_out_rows(self) -> Int[Tensor, " n_held_out"]:
        """The rows that are not trained on, in blocks of consecutive ones."""
        return (self.held_out_blocks.unsqueeze(1) * self.block + torch.arange(self.block)).flatten()

    def begin_reading(self, hooks: Sequence[str], rows: Int[Tensor, " batch"]) -> Callable[[], dict[str, Tensor]]:
        """Read rows in the background.

        Args:
            hooks: The hooks to read.
            rows: The rows, in ascending order.

        Returns:
            What waits for them and returns the activations of each hook, (batch, d_in), in the cache's type; a shard
            that has been cut off meanwhile is a UserError.
        """
        dtype = DTYPES[self.manifest.dtype]
        batch = {hook: torch.empty(len(rows), self.manifest.d_in[hook], dtype=dtype) for hook in hooks}
        ends = torch.searchsorted(rows, self._ends).tolist()
        tasks: list[Future[None]] = []
        for number, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
            if begin < end:
                within = rows[begin:end] - (int(self._ends[number - 1]) if number else 0)
                tasks += [
                    self._pool.submit(_copy, self._shards[number], hook, within, batch[hook][begin:end])
                    for hook in hooks
                ]

        def finish() -> dict[str, Tensor]:
            for task in tasks:
                task.result()
            return batch

        return finish

    def text_of(self, row: int) -> tuple[Int[Tensor, " context_size"], int]:
        """The sequence of tokens that an activation comes from, and the position in it.

        Args:
            row: A row of the cache.
        """
        number = int(torch.searchsorted(self._ends, row, right=True))
        within = row - (int(self._ends[number - 1]) if number else 0)
        kept = self._shards[number][KEPT]
        last_of_sequence = kept.sum(1).cumsum(0)
        sequence = int(torch.searchsorted(last_of_sequence, within, right=True))
        within -= int(last_of_sequence[sequence - 1]) if sequence else 0
        return self._shards[number][TOKENS][sequence], int(kept[sequence].nonzero()[within])

    def tokens(self) -> Int[Tensor, " n_rows"]:
        """The token of each activation."""
        return torch.cat([shard[TOKENS][shard[KEPT]].long() for shard in self._shards])

    def check_serves(self, cfg: LanguageModelRunConfig) -> None:
        """Refuse a run whose activations would be others, or that has too few here.

        Args:
            cfg: The run.

        Raises:
            UserError: If they would; the message names what differs.
        """
        if different := differences(self.manifest.made_from, made_from(cfg)):
            raise UserError(
                f"The activation cache {self.folder} was made otherwise than this run says: {'; '.join(different)}. "
                f"Set the run's fields as they were, or make another cache."
            )
        if self.n_training < cfg.train_batch_size_tokens:
            raise UserError(
                f"The activation cache {self.folder} has {self.n_training:,} activations to train on, fewer than "
                f"train_batch_size_tokens={cfg.train_batch_size_tokens}; lower it, or cache more."
            )


def check_shards(folder: Path, manifest: Manifest, compared_bytes: float) -> None:
    """Refuse shards whose files are not what the manifest says.

    Args:
        folder: The folder of the cache.
        manifest: Its manifest.
        compared_bytes: How many bytes to compare with their checksums, in whole shards chosen at random.

    Raises:
        UserError: If one is not.
    """
    numbers = range(len(manifest.shards))
    n_compared, n_bytes = 0, 0
    for number in random.Random().sample(numbers, len(numbers)):
        try:
            check_shard(folder, number, manifest)
            if n_bytes + manifest.shards[number].n_bytes <= max(compared_bytes, manifest.shards[number].n_bytes):
                n_bytes += manifest.shards[number].n_bytes
                n_compared += 1
                if file_hash(shard_path(folder, number)) != manifest.shards[number].xxh3_128:
                    raise UserError(f"the contents of {shard_path(folder, number)} have changed")
        except UserError as error:
            raise UserError(
                f"The activation cache {folder} is damaged: {error}; copy it again, or remove it and cache anew."
            ) from error
    logger.info(
        f"Activation cache {folder}: {manifest.n_rows:,} activations in {len(numbers)} shards; sizes and headers of "
        f"all were checked, and the checksums of {n_compared}."
    )


def _copy(shard: MappedShard, hook: str, rows: Tensor, target: Tensor) -> None:
    torch.index_select(shard[hook], 0, rows, out=target)


def _memory_bytes() -> float:
    """The memory of this machine."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):
        return float("inf")
