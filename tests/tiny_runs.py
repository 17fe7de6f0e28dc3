"""Run files small enough to train in a second or two on the TinyStories model."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAETrainer
from safetensors.torch import load_file
from torch import Tensor, equal

from sae_lens_matryoshka.training import language_model
from sae_lens_matryoshka.training.options import CheckpointOptions
from sae_lens_matryoshka.training.run import train


def tiny_run(tinystories: Path, checkpoint_path: Path | None, **changes: Any) -> dict[str, Any]:
    """A run of 60 steps that makes a checkpoint every four; one of fewer steps has a constant learning rate.

    Args:
        tinystories: The folder of model and text.
        checkpoint_path: Where checkpoints go.
        **changes: Fields to add or replace; None removes one.
    """
    is_long = changes.get("training_tokens", 60 * 128) >= 30 * 128
    run: dict[str, Any] = {
        "model_name": str(tinystories / "model"),
        "model_class_name": "AutoModelForCausalLM",
        "hook_name": "model.layers.2",
        "dataset_path": str(tinystories / "data"),
        "streaming": False,
        "context_size": 64,
        "sae": tiny_sae(),
        "training_tokens": 60 * 128,
        "train_batch_size_tokens": 128,
        "lr": 1e-2,
        "lr_warm_up_steps": 10 if is_long else 0,
        "lr_decay_steps": 20 if is_long else 0,
        "dead_feature_window": 5,
        "feature_sampling_window": 14,
        "n_batches_in_buffer": 10,
        "store_batch_size_prompts": 3,
        "n_batches_for_norm_estimate": 4,
        "device": "cpu",
        "n_checkpoints": 14,
        "checkpoint_path": None if checkpoint_path is None else str(checkpoint_path),
        "verbose": False,
        "logger": {"log_to_wandb": False},
        **changes,
    }
    return {key: value for key, value in run.items() if value is not None or key == "checkpoint_path"}


def tiny_sae(**changes: Any) -> dict[str, Any]:
    return {
        "architecture": "matryoshka",
        "d_in": 64,
        "d_sae": 128,
        "k": 8,
        "matryoshka_widths": [16, 48, 128],
        "use_matryoshka_aux_loss": True,
        **changes,
    }


def tiny_multi_run(tinystories: Path, checkpoint_path: Path | None, **changes: Any) -> dict[str, Any]:
    """The same for two SAEs on two hooks."""
    return tiny_run(
        tinystories,
        checkpoint_path,
        **{
            "sae": None,
            "hook_name": None,
            "verbose": None,
            "hook_names": {"early": "model.layers.1", "late": "model.layers.2"},
            "saes": {"early": tiny_sae(k=4), "late": tiny_sae(normalize_activations="expected_average_only_in")},
            **changes,
        },
    )


def assert_same_saes(first: Path, second: Path) -> None:
    """That two output folders hold the same SAEs: weights bit for bit, and what their configs say of training."""
    weights = sorted(path.relative_to(first) for path in first.rglob("*.safetensors"))
    assert weights
    for path in weights:
        one, other = load_file(first / path), load_file(second / path)
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            assert equal(tensor, other[name]), f"{path}: {name} differs by {(tensor - other[name]).abs().max()}"
    for path in first.rglob("cfg.json"):
        assert json.loads(path.read_text()) == json.loads((second / path.relative_to(first)).read_text())
    for path in first.rglob("levels.csv"):
        assert path.read_text() == (second / path.relative_to(first)).read_text()


def write_jsonl(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def trained_weights(run: dict[str, Any], output: Path, exact: bool = True) -> dict[str, Tensor]:
    """What a dozen steps of a run make of its SAEs, by the file that holds them."""
    samples: Any = {"calibration_samples": 300, "measure_samples": 300, "checkpointing": CheckpointOptions(exact=exact)}
    short: Any = {"training_tokens": 12 * 128, "lr_warm_up_steps": 0, "lr_decay_steps": 0}
    folder = train({**run, **short}, output=output, **samples).output
    return {
        str(path.relative_to(folder)): torch.cat([tensor.flatten() for tensor in load_file(path).values()])
        for path in folder.rglob("sae_weights.safetensors")
    }


def assert_equal_weights(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    assert all(ours[name].equal(weights) for name, weights in expected.items())


def interrupt_at_step(monkeypatch: pytest.MonkeyPatch, step: int, number: signal.Signals = signal.SIGTERM) -> None:
    """Have the process get a signal in the middle of a training step."""
    original = language_model.fuse_adam

    def fuse_adam(trainer: SAETrainer[Any, Any]) -> None:
        original(trainer)
        train_step = trainer.step

        def interrupted(batch: Any) -> Any:
            if trainer.n_training_steps == step:
                signal.raise_signal(number)
            return train_step(batch)

        trainer.step = interrupted

    monkeypatch.setattr(language_model, "fuse_adam", fuse_adam)
