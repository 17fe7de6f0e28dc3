"""What an activation cache costs and gives: speed of writing, share of reading, and what the order of reading does.

    sae-lens-matryoshka cache RUN --output CACHE
    python benchmarks/activation_cache.py RUN CACHE

All figures that are compared come from one process, in turns, so that whatever else the machine does slows them alike.
"""

import argparse
import copy
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from sae_lens import LoggingConfig, SAETrainer, TrainingSAE
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor

from sae_lens_matryoshka.activation_cache.batches import ShuffledBatches, held_out_batches
from sae_lens_matryoshka.activation_cache.cache import ActivationCache
from sae_lens_matryoshka.activation_cache.manifest import shard_path
from sae_lens_matryoshka.activation_cache.shards import MappedShard
from sae_lens_matryoshka.registration import register
from sae_lens_matryoshka.run_files.building import build_runner_configs
from sae_lens_matryoshka.run_files.reading import read_run_file
from sae_lens_matryoshka.training.caching import cache_activations
from sae_lens_matryoshka.training.channel_scaler import prepare_normalization
from sae_lens_matryoshka.training.fused_adam import fuse_adam
from sae_lens_matryoshka.training.resuming.mixing_buffer import ResumableMixingBuffer
from sae_lens_matryoshka.training.resuming.resumable_store import ResumableActivationsStore

BLOCK = 10
"""Steps in a turn."""


def writing(run: dict[str, Any], n_tokens: int) -> tuple[float, float]:
    """Tokens a second of the model alone, and of caching with it, both within one pass over the text."""
    in_model: list[float] = []
    original = ResumableActivationsStore.activations_of_hooks

    def timed(store: ResumableActivationsStore, tokens: Tensor) -> dict[str, Tensor]:
        begun = time.perf_counter()
        activations = original(store, tokens)
        in_model.append(time.perf_counter() - begun)
        ends.append((begun, time.perf_counter()))
        return activations

    ends: list[tuple[float, float]] = []
    ResumableActivationsStore.activations_of_hooks = timed  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        result = cache_activations(run, Path(folder) / "cache", n_tokens)
        whole = time.perf_counter() - ends[0][0]  # from the first batch on, the last shard and the manifest included
    ResumableActivationsStore.activations_of_hooks = original  # type: ignore[method-assign]
    return result.n_rows / sum(in_model), result.n_rows / whole


class Training:
    """A run's SAE and trainer, fed by whatever gives batches."""

    def __init__(self, cfg: Any, batches: Callable[[], Iterator[Tensor]], n_steps: int) -> None:
        torch.manual_seed(cfg.seed)
        self.sae = TrainingSAE.from_dict(cfg.get_training_sae_cfg_dict())
        trainer_cfg = SAETrainerConfig(
            **{**vars(cfg.to_sae_trainer_config()), "checkpoint_path": None, "n_checkpoints": 0,
               "lr_warm_up_steps": 0, "lr_decay_steps": n_steps // 3,
               "total_training_samples": n_steps * cfg.train_batch_size_tokens,
               "logger": LoggingConfig(log_to_wandb=False)}
        )  # fmt: skip
        self.trainer: Any = SAETrainer(trainer_cfg, self.sae, batches())
        fuse_adam(self.trainer)
        estimate = {
            "expected_average_only_in": self.trainer.activation_scaler.estimate_scaling_factor,
            "covariance_whitening": self.trainer.activation_scaler.estimate_whitening,
        }.get(self.sae.cfg.normalize_activations)
        if estimate is not None:
            estimate(self.sae.cfg.d_in, batches(), cfg.n_batches_for_norm_estimate)
        prepare_normalization(self.trainer)

    def step(self, batch: Tensor) -> None:
        self.trainer.step(batch)
        self.trainer.n_training_steps += 1

    @torch.no_grad()
    def held_out_figures(self, cache: ActivationCache, hook: str, batch_size: int) -> tuple[float, int]:
        """FVU in the units that the SAE is trained in, and latents that never fire, on what is held out."""
        inputs, residuals, fired = [], [], torch.zeros(self.sae.cfg.d_sae, dtype=torch.bool)
        for batch in held_out_batches(cache, hook, batch_size, "cpu"):
            x = self.trainer.activation_scaler(batch)
            output = self.sae.training_forward_pass(TrainStepInput(x, {}, None, self.trainer.n_training_steps, False))
            acts = output.feature_acts.to_dense() if output.feature_acts.is_sparse else output.feature_acts
            fired |= (acts > 0).any(0)
            inputs.append(x)
            residuals.append(x - output.sae_out)
        x, residual = torch.cat(inputs), torch.cat(residuals)
        return (residual.pow(2).sum() / (x - x.mean(0)).pow(2).sum()).item(), int((~fired).sum())


def reading(cfg: Any, cache: ActivationCache, hook: str, n_turns: int) -> dict[str, float]:
    """Seconds a step from memory and from the cache, in turns; of them waiting; of a batch that is not prefetched."""
    batches = ShuffledBatches(cache, [hook], cfg.train_batch_size_tokens, cfg.seed, "cpu")
    training = Training(cfg, lambda: (batch[hook] for batch in batches), 10**6)
    held = [next(batches)[hook] for _ in range(BLOCK)]
    seconds: dict[str, list[float]] = {"memory": [], "cache": [], "waiting": [], "reading alone": []}
    for _ in range(n_turns):
        begun = time.perf_counter()
        for batch in held:
            training.step(batch)
        seconds["memory"].append(time.perf_counter() - begun)
        begun, waited = time.perf_counter(), 0.0
        for _ in range(BLOCK):
            asked = time.perf_counter()
            batch = next(batches)[hook]
            waited += time.perf_counter() - asked
            training.step(batch)
        seconds["cache"].append(time.perf_counter() - begun)
        seconds["waiting"].append(waited)
        rows = torch.randint(cache.n_rows, (BLOCK, cfg.train_batch_size_tokens)).sort(1).values
        begun = time.perf_counter()
        for one in rows:
            cache.begin_reading([hook], one)()[hook].float()
        seconds["reading alone"].append(time.perf_counter() - begun)
    return {name: sorted(values)[len(values) // 2] / BLOCK for name, values in seconds.items()}


def cold(cache: ActivationCache, hook: str, batch_size: int, is_sparsely_read: bool) -> list[float]:
    """Seconds of the first batches when nothing of the cache is in memory, as for one that is larger than memory."""
    numbers = range(len(cache.manifest.shards))
    cache._shards = []  # what is mapped is not given back
    for number in numbers:
        descriptor = os.open(shard_path(cache.folder, number), os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    cache._shards = [MappedShard(shard_path(cache.folder, number), is_sparsely_read) for number in numbers]
    seconds = []
    for _ in range(5):
        rows = torch.randint(cache.n_rows, (batch_size,)).sort().values
        begun = time.perf_counter()
        cache.begin_reading([hook], rows)()
        seconds.append(time.perf_counter() - begun)
    return seconds


def orders(cfg: Any, cache: ActivationCache, hook: str, n_epochs: int) -> dict[str, tuple[float, int]]:
    """FVU and dead latents of the same SAE trained on the same activations in different orders."""
    batch_size = cfg.train_batch_size_tokens
    in_order = cache.training_rows(torch.arange(cache.n_training))

    def in_text_order(size: int) -> Iterator[Tensor]:
        while True:
            for rows in in_order.split(size):
                if len(rows) == size:
                    yield cache.begin_reading([hook], rows)()[hook].float()

    def as_live() -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(cfg.seed)
        n_buffer = cfg.n_batches_in_buffer * cfg.context_size
        return ResumableMixingBuffer(in_text_order(512), n_buffer, batch_size, 0.5, generator)

    def shuffled() -> Iterator[Tensor]:
        return (batch[hook] for batch in ShuffledBatches(cache, [hook], batch_size, cfg.seed, "cpu"))

    figures = {}
    n_steps = n_epochs * cache.n_training // batch_size
    for name, batches in {
        "shuffled as a whole (train --activations)": shuffled,
        f"mixing buffer of {cfg.n_batches_in_buffer * cfg.context_size:,} (as without a cache)": as_live,
        "order of the text (SAELens's cache on disk, unmixed)": lambda: in_text_order(batch_size),
    }.items():
        training = Training(cfg, batches, n_steps)
        for batch in islice(batches(), n_steps):
            training.step(batch)
        figures[name] = training.held_out_figures(cache, hook, batch_size)
    return figures


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="the run file that the cache was made with")
    parser.add_argument("cache", type=Path)
    parser.add_argument("--written", type=int, default=20_000, help="tokens to cache anew, 0 for none")
    parser.add_argument("--turns", type=int, default=5, help=f"turns of {BLOCK} steps from memory and from the cache")
    parser.add_argument("--epochs", type=int, default=2, help="epochs to train in each order, 0 for none")
    options = parser.parse_args()
    register()
    run, console = read_run_file(options.run), Console()
    cfg: Any = build_runner_configs(copy.deepcopy(run))
    cache, hook = ActivationCache(options.cache, compared_bytes=0), cfg.hook_name
    cache.check_serves(cfg)
    console.print(f"{cache.n_rows:,} activations, {cache.manifest.dtype}; load {os.getloadavg()[0]:.1f}")
    if options.written:
        alone, caching = writing(run, options.written)
        table = Table("writing", "tokens a second", "ratio")
        table.add_row("the model alone", f"{alone:,.0f}", "")
        table.add_row("caching", f"{caching:,.0f}", f"{caching / alone:.2f}")
        console.print(table)
    if options.turns:
        seconds = reading(cfg, cache, hook, options.turns)
        table = Table("reading", "ms", "share of a step from memory")
        for name, value in seconds.items():
            table.add_row(name, f"{1e3 * value:.1f}", f"{value / seconds['memory']:.3f}")
        console.print(table)
        table = Table("first batches, nothing in memory", "ms")
        for name, is_sparsely_read in (("pages around", False), ("pages asked for", True)):
            times = cold(cache, hook, cfg.train_batch_size_tokens, is_sparsely_read)
            table.add_row(name, " ".join(f"{1e3 * value:.0f}" for value in times))
        console.print(table)
    if options.epochs:
        table = Table("order", "FVU, units of training", "dead of those held out")
        for name, (fvu, n_dead) in orders(cfg, cache, hook, options.epochs).items():
            table.add_row(name, f"{fvu:.4f}", str(n_dead))
        console.print(table)


if __name__ == "__main__":
    main()
