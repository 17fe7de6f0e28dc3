"""What can go wrong while training: one sentence, the last good checkpoint stands, and the run goes on from it."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from filelock import FileLock
from sae_lens import ActivationsStore, SAETrainer

from sae_lens_matryoshka.errors import ConfigError, UserError
from sae_lens_matryoshka.run_files.building import build_runner_configs
from sae_lens_matryoshka.training import language_model
from sae_lens_matryoshka.training.options import CheckpointOptions
from sae_lens_matryoshka.training.resuming.checkpointer import Checkpointer
from sae_lens_matryoshka.training.resuming.checkpoints import find_checkpoint
from sae_lens_matryoshka.training.resuming.manifest import write_manifest
from sae_lens_matryoshka.training.run import train
from tests import processes
from tests.tiny_runs import assert_same_saes, tiny_multi_run, tiny_run, tiny_sae

SAMPLES: Any = {"calibration_samples": 500, "measure_samples": 500}


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[Any], None]], None]:
    """Have something happen when a training step begins; it is given the trainer."""
    original = language_model.fuse_adam

    def arrange(step: int, happen: Callable[[Any], None]) -> None:
        def fuse_adam(trainer: SAETrainer[Any, Any]) -> None:
            original(trainer)
            train_step = trainer.step

            def step_after_it(batch: Any) -> Any:
                if trainer.n_training_steps == step:
                    happen(trainer)
                return train_step(batch)

            trainer.step = step_after_it

        monkeypatch.setattr(language_model, "fuse_adam", fuse_adam)

    return arrange


def _checkpoints(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("*/[0-9]*")), key=lambda path: int(path.name))


@contextmanager
def _restored_file_size_limit() -> Iterator[Any]:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda n_bytes: resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# 1.5 kB is less than any file of weights or buffer, 100 kB less than the optimizer's only: torch writes that one
@pytest.mark.parametrize("n_bytes", [1_500, 100_000])
def test_a_full_disk(tinystories: Path, tmp_path: Path, at_step: Any, monkeypatch: pytest.MonkeyPatch, n_bytes: int):
    run = tiny_run(tinystories, tmp_path / "checkpoints")
    with _restored_file_size_limit() as limit:
        at_step(9, lambda trainer: limit(n_bytes))
        with pytest.raises(UserError) as stop:
            train(run, output=tmp_path / "out", **SAMPLES)
    message = str(stop.value)
    kept = _checkpoints(tmp_path / "checkpoints")
    assert [path.name for path in kept] == ["640", "1152"]
    assert "could not be written" in message
    assert f"the last checkpoint is {kept[-1]}, continue from it with --resume auto" in message
    assert "\n" not in message
    assert sorted(path.name for path in kept[0].parent.iterdir()) == [".lock", "1152", "640"]
    assert not (tmp_path / "out").exists()

    monkeypatch.undo()
    resumed = train(run, output=tmp_path / "out", resume="auto", **SAMPLES).output
    assert_same_saes(train({**run, "checkpoint_path": None}, output=tmp_path / "whole", **SAMPLES).output, resumed)


def test_a_folder_that_cannot_be_written_is_found_before_the_model_is_loaded(tinystories: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    run = tiny_run(tinystories, tmp_path / "file" / "checkpoints", model_name="nobody/nothing")
    with pytest.raises(UserError, match=r"Checkpoints cannot be written to .*; choose another folder with --set"):
        train(run, output=tmp_path / "out", **SAMPLES)
    with pytest.raises(UserError, match=r"/file is a file\); choose another folder with --output"):
        train(tiny_run(tinystories, None, model_name="nobody/nothing"), output=tmp_path / "file" / "out")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permissions do not bind root")
def test_a_read_only_folder(tinystories: Path, tmp_path: Path):
    (tmp_path / "read_only").mkdir(mode=0o500)
    with pytest.raises(UserError, match="Checkpoints cannot be written to"):
        train(tiny_run(tinystories, tmp_path / "read_only"), output=tmp_path / "out")
    with pytest.raises(PermissionError):
        train(tiny_run(tinystories, None), output=tmp_path / "read_only" / "out")


def test_a_data_set_that_vanishes_between_runs(tinystories: Path, tmp_path: Path):
    data = tmp_path / "data"
    data.mkdir()
    run = tiny_run(tinystories, tmp_path / "checkpoints", dataset_path=str(data))
    data.rmdir()
    with pytest.raises(ConfigError, match=r"dataset_path=.* looks like a local path, but nothing is there"):
        train(run, output=tmp_path / "out", resume="auto")


def test_a_data_set_that_vanishes_while_it_is_streamed(tinystories: Path, tmp_path: Path, at_step: Any):
    data = tmp_path / "data"
    data.mkdir()
    lines = (tinystories / "data" / "train.jsonl").read_text().splitlines()
    for part in range(4):
        (data / f"train-{part}.jsonl").write_text("\n".join(lines[8 * part : 8 * part + 8]))
    run = tiny_run(tinystories, tmp_path / "checkpoints", dataset_path=str(data), streaming=True)
    at_step(6, lambda trainer: shutil.rmtree(data))
    with pytest.raises(UserError) as stop:
        train(run, output=tmp_path / "out", **SAMPLES)
    kept = _checkpoints(tmp_path / "checkpoints")
    assert kept
    assert "train-" in str(stop.value)
    assert f"the last checkpoint is {kept[-1]}" in str(stop.value)


def _broken(run_with_cache: Any, *arguments: Any, **options: Any) -> Any:
    output, cache = run_with_cache(*arguments, **options)
    return output, {name: activations * torch.nan for name, activations in cache.items()}


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("make", [tiny_run, tiny_multi_run])
def test_activations_that_are_not_finite(
    tinystories: Path, tmp_path: Path, at_step: Any, monkeypatch: pytest.MonkeyPatch, make: Any, exact: bool
):
    stores: list[ActivationsStore] = []
    monkeypatch.setattr(language_model, "check_d_in", lambda store, d_in: stores.append(store))

    def break_model(trainer: Any) -> None:
        stores[0].model.run_with_cache = partial(_broken, stores[0].model.run_with_cache)

    at_step(9, break_model)
    with pytest.raises(UserError) as stop:
        train(
            make(tinystories, tmp_path / "checkpoints"),
            output=tmp_path / "out",
            checkpointing=CheckpointOptions(exact=exact),
            **SAMPLES,
        )
    kept = _checkpoints(tmp_path / "checkpoints")
    assert kept
    where = r"around row \d+ of the data set" if exact else r"Training step \d+"
    assert re.search(where, str(stop.value))
    assert "values that are not finite" in str(stop.value)
    assert f"the last checkpoint is {kept[-1]}, continue from it with --resume auto" in str(stop.value)


def test_a_signal_before_the_first_step_stops_at_once(
    tinystories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """There is nothing to save yet, and estimating the norm of a real model's activations takes minutes."""
    original, seen = language_model.fuse_adam, []

    def fuse_adam(trainer: Any) -> None:
        original(trainer)

        def batches(provider: Any) -> Any:
            for batch in provider:
                signal.raise_signal(signal.SIGTERM)
                seen.append(batch)
                yield batch

        trainer.data_provider = batches(trainer.data_provider)

    monkeypatch.setattr(language_model, "fuse_adam", fuse_adam)
    sae = tiny_sae(normalize_activations="expected_average_only_in")
    with pytest.raises(KeyboardInterrupt):
        train(tiny_run(tinystories, tmp_path / "checkpoints", sae=sae), output=tmp_path / "out", **SAMPLES)
    assert not seen
    assert not _checkpoints(tmp_path / "checkpoints")


@pytest.fixture(scope="module")
def checkpointed(tinystories: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A run and the folder of its three checkpoints; damage copies only."""
    folder = tmp_path_factory.mktemp("checkpointed")
    run = tiny_run(tinystories, folder / "checkpoints", training_tokens=20 * 128, lr_decay_steps=5, n_checkpoints=3)
    train(run, output=folder / "out", **SAMPLES)
    return run, folder / "checkpoints"


def _found(run: dict[str, Any], resume: str | Path, **changes: Any) -> str | None:
    """The checkpoint that a run on a language model would resume from."""
    cfg = build_runner_configs({**run, **changes})
    assert not isinstance(cfg, dict)
    return find_checkpoint(cfg, resume)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("file", "damage", "reason"),
    [
        ("sae_weights.safetensors", _truncate, r"sae_weights.safetensors has \d+ bytes, not \d+"),
        ("sae_weights.safetensors", _flip_a_bit, r"the contents of sae_weights.safetensors have changed"),
        ("trainer_state.pt", _flip_a_bit, r"the contents of trainer_state.pt have changed"),
        ("activations_store_position.json", Path.unlink, r"activations_store_position.json is missing"),
        ("cfg.json", Path.unlink, r"cfg.json is missing"),
        ("checkpoint.json", _truncate, r"checkpoint.json cannot be read \(JSONDecodeError"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_by_auto_and_refused_by_name(
    checkpointed: tuple[dict[str, Any], Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    file: str,
    damage: Callable[[Path], None],
    reason: str,
):
    run, original = checkpointed
    folder = tmp_path / "checkpoints"
    shutil.copytree(original, folder)
    older, newest = _checkpoints(folder)[-2:]
    assert _found(run, "auto", checkpoint_path=str(folder)) == str(newest)
    damage(newest / file)
    with pytest.raises(ConfigError, match=f"is not a complete SAELens checkpoint .{reason}"):
        _found(run, newest)
    with caplog.at_level(logging.WARNING):
        assert _found(run, "auto", checkpoint_path=str(folder)) == str(older)
    assert f"{newest} is passed over" in caplog.text


@pytest.mark.parametrize("file", ["sae_weights.safetensors", "trainer_state.pt", "runner_cfg.json"])
def test_a_truncated_checkpoint_of_saelens_own(checkpointed: tuple[dict[str, Any], Path], tmp_path: Path, file: str):
    checkpoint = tmp_path / "512"
    shutil.copytree(_checkpoints(checkpointed[1])[0], checkpoint)
    (checkpoint / "checkpoint.json").unlink()
    assert _found(checkpointed[0], checkpoint) == str(checkpoint)
    _truncate(checkpoint / file)
    with pytest.raises(ConfigError, match=f"{file} is damaged"):
        _found(checkpointed[0], checkpoint)


def test_only_a_checkpoint_of_the_same_run_is_resumed_from(
    checkpointed: tuple[dict[str, Any], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    run, folder = checkpointed
    newest = str(_checkpoints(folder)[-1])
    with caplog.at_level(logging.INFO):
        assert _found(run, "auto", output_path="x", n_checkpoints=0, logger={"wandb_id": "x"}) == newest
    assert f"Continuing from {newest}." in caplog.text
    without_k = {key: value for key, value in run["sae"].items() if key != "k"}
    for change, differs in (
        ({"lr": 0.5}, "lr, lr_end"),
        ({"dataset_path": "x"}, "dataset_path"),
        ({"hook_name": "x"}, "hook_name"),
        ({"autocast": True}, "autocast"),
        ({"training_tokens": 10**6}, "training_tokens"),  # the learning rate's decay was laid out for fewer
        ({"sae": {**run["sae"], "k": 9}}, "sae.k"),
        ({"sae": without_k}, "sae.k"),  # a field that is left out is one with its default
    ):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            assert _found(run, "auto", **change) is None
        assert f"Starting afresh, because {newest} was made with other settings of {differs}." in caplog.text
        with pytest.raises(ConfigError, match=f"was made with other settings of {differs}, and a resumed run goes on"):
            _found(run, newest, **change)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert _found(run, "auto", checkpoint_path=None) is None
        assert _found(run, "auto", checkpoint_path=str(folder / "empty")) is None
    assert "Starting afresh, because checkpoint_path is null." in caplog.text
    assert f"Starting afresh, because there is no checkpoint below {folder / 'empty'}." in caplog.text
    with pytest.raises(ConfigError, match=r"nowhere is not a complete SAELens checkpoint \(there is no such"):
        train({**run, "resume_from_checkpoint": "nowhere"}, output=tmp_path / "out")  # the same as --resume
    final = tmp_path / "final_2560"
    shutil.copytree(newest, final)
    with pytest.raises(ConfigError, match="is a finished SAE, with the normalization of its input folded in"):
        _found(run, final)


def test_what_killed_runs_have_left_is_removed_and_what_live_ones_write_is_not(
    checkpointed: tuple[dict[str, Any], Path], tmp_path: Path
):
    run, original = checkpointed
    folder = tmp_path / "checkpoints"
    shutil.copytree(original, folder)
    [own] = [path for path in folder.iterdir() if path.is_dir()]
    dead, alive = folder / "dead", folder / "alive"
    for left in (own / ".9999.partial", dead / ".128.partial", alive / ".128.partial"):
        left.mkdir(parents=True)
        (left / "sae_weights.safetensors").write_bytes(b"half")
    run = {**run, "checkpoint_path": str(folder), "n_checkpoints": 0}
    with FileLock(alive / ".lock"):
        train(run, output=tmp_path / "out", resume="auto", **SAMPLES)
        assert (alive / ".128.partial").is_dir()
    assert not dead.exists()
    assert {path.name for path in own.iterdir()} == {".lock", *(path.name for path in _checkpoints(folder))}

    with FileLock(own / ".lock"), pytest.raises(UserError, match=f"Another run is writing its checkpoints to {own}"):
        train(run, output=tmp_path / "other", resume="auto", **SAMPLES)


def test_the_buffer_limit_and_the_number_of_checkpoints_on_the_command_line(tinystories: Path, tmp_path: Path):
    run_file = tmp_path / "run.yaml"
    run_file.write_text(yaml.safe_dump(tiny_run(tinystories, tmp_path / "checkpoints", training_tokens=20 * 128)))
    command = ["train", str(run_file), "--output", str(tmp_path / "out"), "--max-buffer-gb", "0.00001"]
    command += ["--keep-checkpoints", "1", "--calibration-samples", "0", "--measure-samples", "500"]
    done = processes.run(command, tmp_path)
    assert done.returncode == 0, done.stderr
    [checkpoint] = _checkpoints(tmp_path / "checkpoints")
    assert re.search(rf"Checkpoint {checkpoint}: 0\.\d MB in \d", done.stderr)
    assert "GB that --max-buffer-gb allows, and is not in the checkpoint" in done.stderr
    position = json.loads((checkpoint / "activations_store_position.json").read_text())
    assert position["buffer_is_saved"] is False


def test_wandb_out_of_reach_does_not_stop_a_run(tinystories: Path, tmp_path: Path):
    run = tiny_run(tinystories, None, logger={"log_to_wandb": True, "log_weights_to_wandb": False})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    command = [sys.executable, "-m", "sae_lens_matryoshka", "train", "run.yaml", "--output", "out"]
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_MODE"}
    environment |= {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": 40 * "a"}
    done = subprocess.run(
        [*command, "--calibration-samples", "500", "--measure-samples", "500"],
        capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "wandb cannot be used (http://127.0.0.1:9 does not answer), so this run logs offline" in done.stderr
    [offline] = (tmp_path / "wandb").glob("offline-run-*")
    assert f"wandb sync {offline}" in done.stderr
    assert list(offline.glob("run-*.wandb"))
    assert (tmp_path / "out" / "cfg.json").is_file()


def test_a_context_longer_than_the_models_is_refused_before_the_model_is_loaded(tinystories: Path, tmp_path: Path):
    run = tiny_run(tinystories, None, context_size=513)
    with pytest.raises(ConfigError, match=r"context_size=513 is above the 512 positions of .*; set context_size=512"):
        train(run, output=tmp_path / "out", **SAMPLES)
    assert not (tmp_path / "out").exists()


def test_the_newest_checkpoints_are_kept_whatever_their_numbers(tmp_path: Path):
    """Resumed from an older one, a run writes lower numbers than are there; damaged ones do not count."""
    written = ["100", "200", "300", "150", "250"]  # in this order
    for age, name in enumerate([*written, "400"]):
        (tmp_path / name).mkdir()
        (tmp_path / name / "sae_weights.safetensors").write_text("weights")
        write_manifest(tmp_path / name)
        os.utime(tmp_path / name, (age, age))
    (tmp_path / "400" / "sae_weights.safetensors").write_text("cut")
    checkpointer = object.__new__(Checkpointer)
    checkpointer.folder, checkpointer.options = tmp_path, CheckpointOptions(keep=2)
    checkpointer._remove_old()
    assert {path.name for path in tmp_path.iterdir()} == {"150", "250", "400"}
