"""Runs that are really killed, several times, and resumed: the same weights, bit for bit, as without."""

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from sae_lens import SAETrainer

from sae_lens_matryoshka.training import language_model
from sae_lens_matryoshka.training.run import train
from tests import processes
from tests.tiny_runs import assert_same_saes, interrupt_at_step, tiny_multi_run, tiny_run, tiny_sae

SAMPLES: Any = {"calibration_samples": 1000, "measure_samples": 1000}


def _command(run: dict[str, Any], folder: Path) -> list[str]:
    run_file = folder / "run.yaml"
    run_file.write_text(yaml.safe_dump(run))
    command = ["train", str(run_file), "--resume", "auto", "--output", str(folder / "out")]
    return [*command, "--calibration-samples", "1000", "--measure-samples", "1000"]


def _kill_after_progress(command: list[str], checkpoints: Path, moment: random.Random) -> tuple[int, bool]:
    """Start a process and SIGKILL it soon after some checkpoints more have appeared.

    Returns:
        How many complete checkpoints there are then, and whether one was left half written.
    """
    there = set(checkpoints.glob("*/[0-9]*"))
    n_new, delay = moment.randint(1, 3), moment.uniform(0, 0.08)
    run = processes.start(command, checkpoints.parent, checkpoints.parent)
    while run.is_alive() and len(set(checkpoints.glob("*/[0-9]*")) - there) < n_new:
        time.sleep(0.002)
    time.sleep(delay)
    run.kill()
    run.join()
    assert run.exitcode == -signal.SIGKILL, "the run ended before it could be killed"
    return len(list(checkpoints.glob("*/[0-9]*"))), bool(list(checkpoints.glob("*/.*.partial")))


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("kind", ["single", "multi"])
def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(
    tinystories: Path, tmp_path: Path, kind: str, streaming: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    make = tiny_run if kind == "single" else tiny_multi_run
    # a checkpoint every other step, so that kills also hit them while they are written
    more = {"streaming": streaming, "training_tokens": 100 * 128, "n_checkpoints": 49}
    expected = train(make(tinystories, None, **more), output=tmp_path / "uninterrupted", **SAMPLES).output

    run = make(tinystories, tmp_path / "checkpoints", **more)
    command = _command(run, tmp_path)
    seed = 2 * (kind == "multi") + streaming
    moment = random.Random(seed)
    for kill in range(3 if kind == "single" else 2):
        n_complete, half_written = _kill_after_progress(command, tmp_path / "checkpoints", moment)
        print(f"seed {seed}, kill {kill}: {n_complete} checkpoints complete, one half written: {half_written}")
        assert not (tmp_path / "out").exists()
    done = processes.run(command, tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same_saes(expected, tmp_path / "out")
    folders = [path for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()]
    assert len(folders) == 1, "a resumed run goes on in the folder of the run it resumes"
    names = {path.name for path in folders[0].iterdir()}
    assert all(name.isdecimal() for name in names - {".lock"}), "nothing unfinished is left"


@pytest.mark.parametrize(
    ("sae", "changes"),
    [
        # at step 14 the window of the firing frequencies ends; 2 is before the first checkpoint
        ({"normalize_activations": "expected_average_only_in"}, {"step": 13}),
        ({"normalize_activations": "expected_average_only_in"}, {"step": 2}),
        ({"normalize_activations": "covariance_whitening"}, {"step": 30}),
        ({"normalize_activations": "layer_norm", "level_weights": [1, 2, 3]}, {"step": 31}),
        ({"dtype": "float64"}, {"step": 45, "lr_scheduler_name": "cosineannealing"}),
        # prefixes are drawn from the number of the step
        ({"prefix_sampling": {"n_prefixes": 4}}, {"step": 22}),
        ({"architecture": "matryoshka_topk"}, {"step": 20}),
        ({"architecture": "matryoshka_jumprelu", "l0_coefficient": 2.0, "l0_warm_up_steps": 40}, {"step": 17}),
        ({"architecture": "matryoshka_standard", "l1_coefficient": 2.0, "l1_warm_up_steps": 40}, {"step": 17}),
        ({"architecture": "matryoshka_batchtopk"}, {"step": 20}),
        ({"architecture": "standard", "l1_coefficient": 2.0, "l1_warm_up_steps": 40}, {"step": 20}),
    ],
    ids=str,
)
def test_an_interrupted_run_ends_as_if_it_had_not_been(
    tinystories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sae: dict[str, Any], changes: dict[str, Any]
):
    step = changes.pop("step")
    settings = tiny_sae(**sae)
    if settings["architecture"].endswith(("standard", "jumprelu")):
        for name in ("k", "use_matryoshka_aux_loss"):
            del settings[name]
    if not settings["architecture"].startswith("matryoshka"):
        del settings["matryoshka_widths"]
    if settings["architecture"] == "matryoshka_topk":
        del settings["use_matryoshka_aux_loss"]
    run = tiny_run(tinystories, tmp_path / "checkpoints", sae=settings, **changes)
    has_threshold = settings["architecture"] in ("matryoshka", "matryoshka_batchtopk")
    samples: Any = SAMPLES if has_threshold else {"measure_samples": 1000}
    expected = train({**run, "checkpoint_path": None}, output=tmp_path / "uninterrupted", **samples).output
    with monkeypatch.context() as patch:
        interrupt_at_step(patch, step)
        with pytest.raises(KeyboardInterrupt):
            train(run, output=tmp_path / "out", **samples)
    [checkpoint] = (tmp_path / "checkpoints").glob(f"*/{(step + 1) * 128}")
    result = train(run, output=tmp_path / "out", resume="auto", **samples)
    assert_same_saes(expected, result.output)
    # thresholds that the first part had passed are not passed again
    assert (
        len([path for path in checkpoint.parent.glob("[0-9]*") if int(path.name) <= int(checkpoint.name)])
        <= step // 4 + 2
    )


def test_ctrl_c_twice_stops_at_once(tinystories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = tiny_run(tinystories, tmp_path / "checkpoints", n_checkpoints=0)
    original = language_model.fuse_adam

    def fuse_adam(trainer: SAETrainer[Any, Any]) -> None:
        original(trainer)

        def twice(batch: Any) -> Any:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

        trainer.step = twice

    monkeypatch.setattr(language_model, "fuse_adam", fuse_adam)
    before = signal.getsignal(signal.SIGINT)  # SAELens's own runner, where a test has run it, leaves one of its own
    with pytest.raises(KeyboardInterrupt):
        train(run, output=tmp_path / "out", **SAMPLES)
    assert [path.name for path in tmp_path.iterdir()] == [".out.lock"]
    assert signal.getsignal(signal.SIGINT) is before


def test_without_exact_resume_checkpoints_are_saelens_own(
    tinystories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from sae_lens_matryoshka.training.options import CheckpointOptions

    options = CheckpointOptions(exact=False, keep=2)
    run = tiny_run(tinystories, tmp_path / "checkpoints")
    uninterrupted = train(run, output=tmp_path / "uninterrupted", checkpointing=options, **SAMPLES).output
    checkpoints = sorted((tmp_path / "checkpoints").glob("*/[0-9]*"), key=lambda path: int(path.name))
    assert len(checkpoints) == 2, "--keep-checkpoints"
    names = {path.name for path in checkpoints[0].iterdir()}
    assert "activations_store_position.json" not in names
    assert (checkpoints[0] / "activations_store_state.safetensors").stat().st_size < 1000
    # the order of the data is that of exact runs, with the same seed
    assert_same_saes(uninterrupted, train(run, output=tmp_path / "exact", **SAMPLES).output)
