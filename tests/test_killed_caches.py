"""Activation caches that are killed while they are written or trained from: the same bytes as without."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from sae_lens_matryoshka.activation_cache.cache import ActivationCache
from sae_lens_matryoshka.activation_cache.manifest import read_manifest
from sae_lens_matryoshka.training.caching import cache_activations
from sae_lens_matryoshka.training.run import train
from tests import processes
from tests.tiny_runs import assert_same_saes, interrupt_at_step, tiny_multi_run, tiny_run, tiny_sae

SAMPLES: Any = {"calibration_samples": 200, "measure_samples": 200}
MAKE = {"single": tiny_run, "multi": tiny_multi_run}


def _n_shards(cache: Path) -> int:
    try:
        return len(json.loads((cache / "manifest.json").read_text())["shards"])
    except FileNotFoundError:
        return 0


def _start_and_kill(command: list[str], cache: Path, moment: random.Random) -> None:
    """SIGKILL a process soon after some shards more have been written."""
    n_wanted, delay = _n_shards(cache) + moment.randint(1, 2), moment.uniform(0, 0.1)
    process = processes.start(command, cache.parent, cache.parent)
    while process.is_alive() and _n_shards(cache) < n_wanted:
        time.sleep(0.002)
    time.sleep(delay)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "the command ended before it could be killed"


@pytest.mark.parametrize(("kind", "streaming"), [("single", False), ("multi", True)])
def test_a_cache_killed_at_random_moments_is_the_same_bytes(
    tinystories: Path, tmp_path: Path, kind: str, streaming: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run = MAKE[kind](tinystories, None, streaming=streaming)
    n_megabytes = 1 if kind == "single" else 2
    options: Any = {"tokens": 50_000, "shard_bytes": n_megabytes * 2**20}
    expected = cache_activations(run, tmp_path / "uninterrupted", **options).folder
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    cache = tmp_path / "cache"
    command = ["cache", str(tmp_path / "run.yaml"), "--output", str(cache), "--tokens", "50000"]
    command += ["--shard-mb", str(n_megabytes)]
    moment = random.Random(2 * (kind == "multi") + streaming)
    for _ in range(2):
        _start_and_kill(command, cache, moment)
    (cache / ".shard-00099.safetensors.partial").write_bytes(b"half")  # as a kill while writing leaves it
    done = processes.run(command, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Going on after" in done.stderr
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == {
        path.name: path.read_bytes() for path in expected.iterdir()
    }
    assert "Already done" in processes.run(command, tmp_path).stdout


@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGINT, signal.SIGINT]], ids=str)
def test_what_is_asked_to_stop_ends_quietly_also_when_it_is_asked_again(
    tinystories: Path, tmp_path: Path, signals: list[signal.Signals]
):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny_run(tinystories, None)))
    command = ["cache", str(tmp_path / "run.yaml"), "--output", str(tmp_path / "cache"), "--tokens", "50000"]
    # and once more at the very end, in the midst of what other packages do then
    program = f"""
import atexit, os, signal, sys
from sae_lens_matryoshka.cli.command_line import main
atexit.register(os.kill, os.getpid(), signal.SIGINT)
sys.argv[1:] = {[*command, "--shard-mb", "1"]}
sys.exit(main())
"""
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not _n_shards(tmp_path / "cache"):
        time.sleep(0.01)
    for number in signals:
        process.send_signal(number)
        time.sleep(0.002)
    _, stderr = process.communicate()
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert "activations in complete shards" in stderr
    assert stderr.endswith("Interrupted.\n")
    if len(signals) == 1:  # a second one stops at once
        assert _n_shards(tmp_path / "cache") == len(list((tmp_path / "cache").glob("shard-*")))


def test_ctrl_c_says_how_to_go_on(tinystories: Path, tmp_path: Path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny_run(tinystories, None)))
    command = ["cache", str(tmp_path / "run.yaml"), "--output", str(tmp_path / "cache"), "--tokens", "50000"]
    process = processes.start([*command, "--shard-mb", "1"], tmp_path, tmp_path)
    while process.is_alive() and not _n_shards(tmp_path / "cache"):
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 130
    assert "activations in complete shards" in (tmp_path / "stderr").read_text()
    other = tiny_run(tinystories, None, store_batch_size_prompts=5)
    with pytest.raises(ValueError, match=r"store_batch_size_prompts 5, not 3"):
        cache_activations(other, tmp_path / "cache", tokens=50_000, shard_bytes=2**20)
    two_hooks = tiny_multi_run(tinystories, None, store_batch_size_prompts=3)
    with pytest.raises(ValueError, match=r"hook 'model.layers.1', which is not among model.layers.2"):
        cache_activations(two_hooks, tmp_path / "cache", tokens=50_000, shard_bytes=2**20)
    # what is there can be made do with, also where nothing else is left
    [position] = (tmp_path / "cache").glob("position-*/activations_store_position.json")
    assert sum(path.stat().st_size for path in position.parent.iterdir()) < 2**16
    position.write_text(position.read_text().replace("1", "2"))
    with pytest.raises(ValueError, match=r"position in the text is damaged .* by --tokens \d+"):
        cache_activations(tiny_run(tinystories, None), tmp_path / "cache", tokens=50_000, shard_bytes=2**20)
    n_rows = read_manifest(tmp_path / "cache").n_rows
    result = cache_activations(tiny_run(tinystories, None), tmp_path / "cache", tokens=1000, shard_bytes=2**20)
    assert (result.n_rows, result.was_finished) == (n_rows, False)
    assert ActivationCache(tmp_path / "cache").n_rows == n_rows


@pytest.mark.parametrize("kind", MAKE)
def test_training_from_a_cache_that_is_interrupted_ends_as_if_it_had_not_been(
    tinystories: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
):
    changes: Any = {"prefetch_llm_batches": True}
    if kind == "single":
        changes["sae"] = tiny_sae(normalize_activations="channel_standardization")
    make = MAKE[kind]
    cache = cache_activations(make(tinystories, None), tmp_path / "cache", tokens=3000, shard_bytes=2**18).folder
    options: Any = {"calibration_samples": 100, "measure_samples": 100, "activations": cache}
    expected = train(make(tinystories, None, **changes), output=tmp_path / "uninterrupted", **options).output
    run = make(tinystories, tmp_path / "checkpoints", **changes)
    # of three epochs the first and the last: a batch crosses their ends
    for step in (3, 45):
        with monkeypatch.context() as patch:
            interrupt_at_step(patch, step)
            with pytest.raises(KeyboardInterrupt):
                train(run, output=tmp_path / "out", resume="auto", **options)
    result = train(run, output=tmp_path / "out", resume="auto", **options)
    assert_same_saes(expected, result.output)


def test_training_from_a_cache_that_is_killed_ends_as_if_it_had_not_been(
    tinystories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    cache = cache_activations(tiny_run(tinystories, None), tmp_path / "cache", tokens=6000).folder
    more: Any = {"training_tokens": 300 * 128, "n_checkpoints": 99}
    expected = train(
        tiny_run(tinystories, None, **more), tmp_path / "uninterrupted", activations=cache, **SAMPLES
    ).output
    run = tiny_run(tinystories, tmp_path / "checkpoints", **more)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    command = ["train", str(tmp_path / "run.yaml"), "--activations", str(cache), "--resume", "auto"]
    command += ["--output", str(tmp_path / "out"), "--calibration-samples", "200", "--measure-samples", "200"]
    process = processes.start(command, tmp_path, tmp_path)
    while process.is_alive() and len(list((tmp_path / "checkpoints").glob("*/[0-9]*"))) < 3:
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    done = processes.run(command, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Continuing from" in done.stderr
    assert_same_saes(expected, tmp_path / "out")


def test_a_checkpoint_of_another_cache_is_not_gone_on_with(
    tinystories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = tiny_run(tinystories, tmp_path / "checkpoints")
    cache = cache_activations(run, tmp_path / "cache", tokens=3000).folder
    options: Any = {"calibration_samples": 100, "measure_samples": 100, "activations": cache}
    with monkeypatch.context() as patch:
        interrupt_at_step(patch, 20)
        with pytest.raises(KeyboardInterrupt):
            train(run, output=tmp_path / "out", **options)
    cache.rename(tmp_path / "old")
    cache_activations(run, cache, tokens=4000)
    with pytest.raises(ValueError, match="was made on other activations than"):
        train(run, output=tmp_path / "out", resume="auto", **options)
