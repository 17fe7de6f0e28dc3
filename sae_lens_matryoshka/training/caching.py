"""Writing an activation cache: one pass of a run's language model over its text, into shards that are whole or absent.

The data's way: run file -> SAELens's runner with a store whose position can be taken up again -> sequences, and their
activations at every hook -> shards. The manifest is written when a shard and the position after it are on disk, so it
says what there is after any kill; the same command then goes on to the same files, bit for bit on a CPU.
Ctrl-C and SIGTERM stop it between two batches, and never while a shard is written.
"""

import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sae_lens import MultiSAETrainingRunnerConfig, TopKTrainingSAEConfig
from safetensors import SafetensorError
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_matryoshka.activation_cache.cache import check_shards
from sae_lens_matryoshka.activation_cache.made_from import check_outside_sources, differences, hooks_of, made_from
from sae_lens_matryoshka.activation_cache.manifest import (
    DTYPES,
    MANIFEST_FILENAME,
    Manifest,
    is_activation_cache,
    read_manifest,
    shard_path,
    write_manifest,
)
from sae_lens_matryoshka.activation_cache.shards import write_shard
from sae_lens_matryoshka.errors import ConfigError, UserError
from sae_lens_matryoshka.run_files.building import LanguageModelRunConfig, RunnerConfig
from sae_lens_matryoshka.training.language_model import language_model_runner
from sae_lens_matryoshka.training.options import CheckpointOptions
from sae_lens_matryoshka.training.output_folders import output_folder, output_lock
from sae_lens_matryoshka.training.resuming.manifest import find_damage, flush_folder
from sae_lens_matryoshka.training.resuming.manifest import write_manifest as write_digests
from sae_lens_matryoshka.training.resuming.resumable_store import ResumableActivationsStore
from sae_lens_matryoshka.training.run import runner_configs
from sae_lens_matryoshka.training.stopping import Stopping

logger = logging.getLogger(__name__)

SHARD_BYTES = 128 * 2**20
"""What a shard takes, unless that makes more than :data:`MOST_SHARDS`: what a kill costs at most."""

MOST_SHARDS = 256

_POSITION_BYTES = 64 * 2**10
"""About what a position in the text takes."""

_OF_WRITING = {
    "store_batch_size_prompts": "store_batch_size_prompts",
    "shard_bytes": "bytes a shard (--shard-mb)",
}
"""What an unfinished cache must be gone on with, by its name in the manifest."""


class CacheResult(NamedTuple):
    """What :func:`cache_activations` leaves behind."""

    folder: Path
    n_rows: int
    """Activations in it."""

    was_finished: bool
    """Whether all was there already."""


def cache_activations(
    run: "Mapping[str, Any] | RunnerConfig",
    output: str | Path,
    tokens: int | None = None,
    dtype: str = "bfloat16",
    shard_bytes: int | None = None,
    trust_remote_code: bool = False,
) -> CacheResult:
    """Write the activations that a run reads, at all of its hooks, in one pass over its text at most.

    Args:
        run: A config of one of SAELens's runners on a language model, or a run file's contents. Of its SAEs only hook
            and width count.
        output: The folder to write. An unfinished cache of the same run there is gone on with.
        tokens: How many activations to cache; None takes ``training_tokens``. Batches of the model are cached whole.
            Where the text ends before, the cache ends there. An unfinished cache may be gone on with to another number.
        dtype: The type to keep them in, one of :data:`DTYPES`.
        shard_bytes: A shard ends with the batch that reaches this size; None takes 128 MiB, or more if there were more
            than 256 shards.
        trust_remote_code: Whether code that comes with a data set may be run, and a run file may ask for that of a
            model.

    Raises:
        ConfigError: If the run, an option, the model or the data set cannot be used, or the output lies in one of them.
        UserError: If the output holds something else, there is no room, or the activations are not finite.
        KeyboardInterrupt: On Ctrl-C or SIGTERM, after the batch or shard in hand; at once while the model is loaded, or
            if it is the second. What is complete stays.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype!r} must be one of {', '.join(DTYPES)}.")
    for option, number in (("--tokens", tokens), ("--shard-mb", shard_bytes)):
        if number is not None and number < 1:
            raise ConfigError(f"{option} must be at least 1.")
    cfg = runner_configs(run, trust_remote_code)
    if isinstance(cfg, dict):
        raise ConfigError("A synthetic model's activations need no cache: they are drawn as they are needed.")
    folder = output_folder(output).absolute()
    check_outside_sources(folder, cfg)
    wanted = Manifest(made_from(cfg), tokens or cfg.training_tokens, cfg.store_batch_size_prompts, 0, dtype)
    n_bytes = wanted.n_wanted * wanted.row_bytes
    wanted = replace(wanted, shard_bytes=shard_bytes or max(SHARD_BYTES, n_bytes // MOST_SHARDS))
    with Stopping() as stopping, output_lock(folder):
        manifest = _begun(folder, wanted)
        if manifest.finished:
            check_shards(folder, manifest, float("inf"))
            return CacheResult(folder, manifest.n_rows, was_finished=True)
        _check_room(folder, _bytes_to_write(cfg, manifest))
        folder.mkdir(parents=True, exist_ok=True)
        write_manifest(folder, manifest)
        try:
            if manifest.n_rows < manifest.n_wanted:
                manifest = _go_on(cfg, folder, manifest, stopping)
            manifest = replace(manifest, finished=True, text_ended=manifest.n_rows < manifest.n_wanted)
            write_manifest(folder, manifest)
            shutil.rmtree(_position(folder, len(manifest.shards)), ignore_errors=True)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"The activation cache {folder} could not be finished ({error}); "
                f"{_size(shutil.disk_usage(folder).free)} are free. The same command goes on with it."
            ) from error
        except KeyboardInterrupt:
            logger.warning(
                f"Interrupted with {read_manifest(folder).n_rows:,} of {manifest.n_wanted:,} activations in complete "
                f"shards of {folder}; the same command goes on with it."
            )
            raise
    return CacheResult(folder, manifest.n_rows, was_finished=False)


def _begun(folder: Path, wanted: Manifest) -> Manifest:
    """The manifest of what is in a folder already, or that of a new cache.

    Raises:
        UserError: If the folder holds something else.
    """
    if not is_activation_cache(folder):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(
                f"The output {folder} is not empty and no activation cache (no {MANIFEST_FILENAME}); choose another."
            )
        return wanted
    there = read_manifest(folder)
    if not there.shards:  # of a run that was mistaken, perhaps
        return wanted
    of_both = {**wanted.made_from["hooks"], **there.made_from["hooks"]}
    different = differences(there.made_from, wanted.made_from, () if there.finished else of_both)
    if there.dtype != wanted.dtype:
        different.append(f"--dtype {wanted.dtype}, not {there.dtype}")
    if there.finished:  # one that holds more serves as well
        if there.n_rows < wanted.n_wanted and not there.text_ended:
            different.append(f"{wanted.n_wanted:,} activations, not {there.n_rows:,}")
    else:
        different += [
            f"{called} {getattr(wanted, name):,}, not {getattr(there, name):,}"
            for name, called in _OF_WRITING.items()
            if getattr(wanted, name) != getattr(there, name)
        ]
    if different:
        raise UserError(
            f"The output {folder} is {'a' if there.finished else 'an unfinished'} cache of other activations than this "
            f"run's: {'; '.join(different)}. Set the run's fields as they were, or choose another folder."
        )
    return there if there.finished else replace(there, n_wanted=wanted.n_wanted)


def _bytes_to_write(cfg: LanguageModelRunConfig, manifest: Manifest) -> int:
    """What is missing of a cache: activations in whole batches, tokens, which are kept, and two positions for a moment.

    Where tokens are excluded there are more sequences than can be known.
    """
    n_kept = len(range(cfg.context_size)[slice(*cfg.seqpos_slice)])
    batch_rows = cfg.store_batch_size_prompts * n_kept
    n_batches = -(-(manifest.n_wanted - manifest.n_rows) // batch_rows)
    sequence_bytes = cfg.context_size * (torch.int32.itemsize + torch.bool.itemsize)
    batch_bytes = batch_rows * manifest.row_bytes + cfg.store_batch_size_prompts * sequence_bytes
    return max(0, n_batches) * batch_bytes + 2 * _POSITION_BYTES


def _size(n_bytes: int) -> str:
    return tqdm.format_sizeof(n_bytes, "B")


def _check_room(folder: Path, n_bytes: int) -> None:
    beside = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(beside).free
    if n_bytes > free:
        raise UserError(
            f"The activations would take {_size(n_bytes)}, but {_size(free)} are free at {beside}; "
            f"choose another disk, or fewer with --tokens."
        )


def _go_on(cfg: LanguageModelRunConfig, folder: Path, manifest: Manifest, stopping: Stopping) -> Manifest:
    store = _store(cfg)
    _take_up(folder, manifest, store)
    begun, n_before = time.perf_counter(), manifest.n_rows
    batches = _batches(store, hooks_of(cfg), DTYPES[manifest.dtype])
    with tqdm(
        total=manifest.n_wanted, initial=n_before, desc="Caching activations", unit=" tokens", unit_scale=True
    ) as progress:
        while manifest.n_rows < manifest.n_wanted:
            shard = list(_shard(batches, manifest, progress, stopping))
            if not any(batch.kept.any() for batch in shard):
                break
            manifest = _add(folder, manifest, shard, store)
    if manifest.n_rows == 0:
        raise UserError(store.why_no_sequence())
    if manifest.n_rows < manifest.n_wanted:
        logger.info(
            f"The text ends after {manifest.n_rows:,} activations, before the {manifest.n_wanted:,} asked for, and so "
            f"does the cache: training goes through it again and again."
        )
    logger.info(f"{(manifest.n_rows - n_before) / (time.perf_counter() - begun):,.0f} activations a second.")
    return manifest


def _store(cfg: LanguageModelRunConfig) -> ResumableActivationsStore:
    """The activation store of a run, its model and data set loaded and checked as for training."""
    stand_ins = {
        hook: TopKTrainingSAEConfig(d_in=fields["d_in"], d_sae=1, k=1) for hook, fields in hooks_of(cfg).items()
    }
    if isinstance(cfg, MultiSAETrainingRunnerConfig):  # no SAE is trained: of one latent, it costs nothing
        cfg.saes = {name: stand_ins[hook] for name, hook in cfg.hook_names_per_sae.items()}
    else:
        cfg.sae = stand_ins[cfg.hook_name]
        cfg.from_pretrained_path = None
        cfg.use_cached_activations = False
    cfg.prefetch_llm_batches = False  # a thread that reads ahead has no position
    store = language_model_runner(cfg, CheckpointOptions()).activations_store
    assert isinstance(store, ResumableActivationsStore)
    return store


class _Batch(NamedTuple):
    """What the model makes of some sequences."""

    activations: dict[str, Tensor]
    """Of each hook, (rows, d_in)."""

    tokens: Tensor
    """(sequences, context_size)"""

    kept: Tensor
    """Which tokens have a row, (sequences, context_size)."""


def _batches(store: ResumableActivationsStore, hooks: dict[str, Any], dtype: torch.dtype) -> Iterator[_Batch]:
    """One pass over the text from where the store stands; the last batch may have fewer sequences."""
    positions = torch.zeros(store.context_size, dtype=torch.bool)
    positions[slice(*store.seqpos_slice)] = True
    read: list[Tensor] = []

    def activations(raise_on_epoch_end: bool) -> dict[str, Tensor]:
        sequences = list(islice(store.iterable_sequences, store.store_batch_size_prompts))
        if not sequences:
            raise StopIteration
        tokens = torch.stack(sequences).to(next(store.model.parameters()).device)
        read[:] = tokens.cpu(), positions.expand(tokens.shape)
        if store.exclude_special_tokens is not None:
            read[1] = positions & ~torch.isin(read[0], store.exclude_special_tokens.cpu())
        of_hooks = store.activations_of_hooks(tokens)
        kept = read[1][:, positions]
        return {hook: values.cpu()[kept] for hook, values in of_hooks.items()}

    while True:
        try:
            batch = store.watched(activations, True)
        except StopIteration:
            return
        for values in batch.values():
            store.check_finite(values)
        yield _Batch({hook: batch[hook].to(dtype) for hook in hooks}, read[0], read[1])


def _shard(
    batches: Iterator[_Batch], manifest: Manifest, progress: "tqdm[Any]", stopping: Stopping
) -> Iterator[_Batch]:
    """The batches of the next shard."""
    n_rows = 0
    while manifest.n_rows + n_rows < manifest.n_wanted and n_rows * manifest.row_bytes < manifest.shard_bytes:
        stopping.check()
        batch = next(batches, None)
        if batch is None:
            return
        n_rows += int(batch.kept.sum())
        progress.update(int(batch.kept.sum()))
        yield batch


def _add(folder: Path, manifest: Manifest, shard: list[_Batch], store: ResumableActivationsStore) -> Manifest:
    """Write a shard and the position after it, then the manifest that has them."""
    number = len(manifest.shards)
    record = write_shard(
        shard_path(folder, number),
        {hook: torch.cat([batch.activations[hook] for batch in shard]) for hook in manifest.d_in},
        torch.cat([batch.tokens for batch in shard]),
        torch.cat([batch.kept for batch in shard]),
    )
    position = _position(folder, number + 1)
    shutil.rmtree(position, ignore_errors=True)
    position.mkdir()
    store.save_to_checkpoint(position)
    write_digests(position)
    flush_folder(folder)
    manifest = replace(manifest, shards=(*manifest.shards, record))
    write_manifest(folder, manifest)
    shutil.rmtree(_position(folder, number), ignore_errors=True)
    return manifest


def _take_up(folder: Path, manifest: Manifest, store: ResumableActivationsStore) -> None:
    """Bring the store to where a killed process has left off, and remove what it left half done."""
    n_shards = len(manifest.shards)
    complete = {shard_path(folder, number) for number in range(n_shards)}
    for path in folder.iterdir():
        if path.name.startswith("position-") and path != _position(folder, n_shards):
            shutil.rmtree(path)
        elif path.name.startswith((".shard-", "shard-")) and path not in complete:
            path.unlink()
    if n_shards == 0:
        return
    check_shards(folder, manifest, 0)
    position = _position(folder, n_shards)
    if damage := find_damage(position):
        raise UserError(
            f"The activation cache {folder} cannot be gone on with, since its position in the text is damaged "
            f"({damage}); make do with what is there, by --tokens {manifest.n_rows}, or remove it and begin anew."
        )
    store.load_from_checkpoint(position)
    logger.info(f"Going on after {manifest.n_rows:,} activations in {n_shards} complete shards of {folder}.")


def _position(folder: Path, n_shards: int) -> Path:
    """Where the position in the text after some shards is kept until there is another."""
    return folder / f"position-{n_shards:05d}"
