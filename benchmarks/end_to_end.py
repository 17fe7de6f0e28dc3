"""Tokens a second of whole runs through SAELens's runner, ours beside SAELens's own Matryoshka SAE.

Two runs: the TinyStories model with its forward pass included, and activations that are at hand already (as from
SAELens's cache) at d_in 768, d_sae 16384. Everything between the first and the last training step counts.

    python benchmarks/end_to_end.py --tinystories ../shared/tinystories
"""

import argparse
import itertools
import os
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from contenders import Shape, batches
from sae_lens import (
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
    SAETrainer,
)
from sae_lens.config import SAETrainerConfig
from train_step import machine

from sae_lens_matryoshka import MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig, paper_widths
from sae_lens_matryoshka.run_files.building import build_runner_configs
from sae_lens_matryoshka.run_files.reading import read_run_file
from sae_lens_matryoshka.training.fused_adam import fuse_adam
from sae_lens_matryoshka.training.language_model import LanguageModelRunner
from sae_lens_matryoshka.training.options import CheckpointOptions


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tinystories", type=Path, help="folder with model/ and data/")
    parser.add_argument("--tokens", type=int, default=200_000, help="tokens of each TinyStories run")
    parser.add_argument("--steps", type=int, default=8, help="steps of each run on given activations")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each, taking turns; the faster one counts")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    print(f"{machine('cpu')}\n")
    print("| run | ours, tokens/s | SAELens matryoshka, tokens/s | ratio |\n|---|---|---|---|")
    if options.tinystories:
        report(
            "TinyStories model and SAE, 64/2048/2048/16",
            [lambda ours=ours: tinystories(options.tinystories, options.tokens, ours) for ours in (True, False)],
            options.repeats,
        )
    report(
        "activations at hand, 768/16384/2048/40",
        [lambda ours=ours: given_activations(options.steps, ours) for ours in (True, False)],
        options.repeats,
    )


def report(name: str, runs: list[Any], repeats: int) -> None:
    """Run ours and theirs in turn and print a row."""
    rates: list[list[float]] = [[], []]
    for _ in range(repeats):
        for run, measured in zip(runs, rates, strict=True):
            measured.append(run())
    ours, theirs = (max(measured) for measured in rates)
    print(f"| {name} | {ours:,.0f} | {theirs:,.0f} | {ours / theirs:.2f}x |", flush=True)


def tinystories(folder: Path, n_tokens: int, ours: bool) -> float:
    """Tokens a second of a run on the TinyStories model, its forward pass included."""
    architecture = "matryoshka" if ours else "matryoshka_batchtopk"
    run = read_run_file(
        "tinystories",
        [
            f"model_name={folder / 'model'}",
            f"dataset_path={folder / 'data'}",
            "hook_name=model.layers.2",
            "streaming=false",
            "sae.d_in=64",
            "sae.d_sae=2048",
            "sae.k=16",
            f"sae.matryoshka_widths={paper_widths(2048)}",
            f"sae.architecture={architecture}",
            f"training_tokens={n_tokens}",
            "lr_warm_up_steps=0",
            "lr_decay_steps=0",
            "checkpoint_path=null",
            "device=cpu",
        ],
    )
    cfg = build_runner_configs(run)
    assert isinstance(cfg, LanguageModelSAERunnerConfig)
    with tempfile.TemporaryDirectory() as output:
        cfg.output_path = output
        torch.manual_seed(cfg.seed)
        runner = LanguageModelSAETrainingRunner(cfg)
        if ours:
            runner = LanguageModelRunner(cfg, CheckpointOptions(exact=False))
        start = time.perf_counter()
        runner.run()
        return n_tokens / (time.perf_counter() - start)


def given_activations(n_steps: int, ours: bool) -> float:
    """Tokens a second of SAELens's trainer on activations that need no model."""
    shape = Shape(768, 16384, 2048, 40)
    sizes: dict[str, Any] = {"d_in": 768, "d_sae": 16384, "k": 40, "matryoshka_widths": paper_widths(16384)}
    torch.manual_seed(0)
    sae = (
        MatryoshkaTrainingSAE(MatryoshkaTrainingSAEConfig(**sizes))
        if ours
        else MatryoshkaBatchTopKTrainingSAE(MatryoshkaBatchTopKTrainingSAEConfig(**sizes))
    )
    n_tokens = n_steps * shape.batch
    cfg = SAETrainerConfig(n_tokens, shape.batch, lr=1e-4, lr_end=1e-4)
    trainer = SAETrainer(cfg, sae, itertools.cycle(batches(shape, 4, "cpu")))
    if ours:
        fuse_adam(trainer)
    start = time.perf_counter()
    trainer.fit()
    return n_tokens / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
