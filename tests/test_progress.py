"""Progress bars: training's moves at every step; all are drawn again on a terminal and are lines elsewhere."""

import fcntl
import io
import os
import struct
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tqdm.auto import tqdm

from sae_lens_matryoshka.cli import progress
from sae_lens_matryoshka.training.progress_bar import move_bar_every_step
from sae_lens_matryoshka.training.run import train
from tests.tiny_runs import tiny_multi_run, tiny_run


@pytest.fixture
def living_bars(monkeypatch: pytest.MonkeyPatch) -> Iterator[progress.LivingProgressBars]:
    monkeypatch.setattr(progress, "SECONDS_ON_A_TERMINAL", 0.05)
    monkeypatch.setattr(progress, "SECONDS_ELSEWHERE", 0.05)
    bars = progress.LivingProgressBars()
    yield bars
    bars.stop()


def test_a_bar_that_waits_is_drawn_again_on_a_terminal(
    living_bars: progress.LivingProgressBars, monkeypatch: pytest.MonkeyPatch
):
    terminal, its_other_end = os.openpty()
    # tqdm draws nothing into no columns
    fcntl.ioctl(its_other_end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    with os.fdopen(its_other_end, "w") as stderr:
        monkeypatch.setattr("sys.stderr", stderr)
        living_bars.start()
        with tqdm(total=2, desc="A slow step"):
            time.sleep(1.3)
        living_bars.stop()
        drawn = os.read(terminal, 100_000).decode()
    os.close(terminal)
    assert drawn.count("A slow step") > 5
    assert "00:01<?" in drawn  # tqdm alone draws the bar at the start and, as the second is over, at the end


def test_without_a_terminal_bars_are_whole_lines(
    living_bars: progress.LivingProgressBars, monkeypatch: pytest.MonkeyPatch
):
    log = io.StringIO()
    monkeypatch.setattr("sys.stderr", log)
    living_bars.start()
    with tqdm(total=3, desc="Outer") as outer, tqdm(total=4, desc="Inner", leave=False) as inner:
        for _ in range(3):
            inner.update()
            outer.update()
            time.sleep(0.1)
    living_bars.stop()
    lines = log.getvalue().splitlines()
    assert "\r" not in log.getvalue()
    assert any("Outer: " in line and " | Inner: " in line for line in lines)
    assert "Outer: 100%" in lines[-1]
    assert len(lines) <= 9


def test_a_bar_is_not_shown_before_its_delay(living_bars: progress.LivingProgressBars, monkeypatch: pytest.MonkeyPatch):
    log = io.StringIO()
    monkeypatch.setattr("sys.stderr", log)
    living_bars.start()
    with tqdm(total=3, desc="Soon over", delay=60):
        time.sleep(0.2)
    living_bars.stop()
    assert log.getvalue() == ""


def test_bars_are_as_they_were_afterwards(living_bars: progress.LivingProgressBars):
    display, clear = tqdm.display, tqdm.clear
    living_bars.start()
    living_bars.start()
    living_bars.stop()
    living_bars.stop()
    assert (tqdm.display, tqdm.clear) == (display, clear)


@pytest.mark.parametrize("several", [False, True])
def test_the_bar_of_a_short_run_ends_at_100_percent(
    several: bool, tinystories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = (tiny_multi_run if several else tiny_run)(tinystories, None, n_checkpoints=0)
    train(run, output=tmp_path / "sae", calibration_samples=0, measure_samples=64)
    last = next(line for line in capsys.readouterr().err.split("\r")[::-1] if "7.68k/7.68k" in line)
    assert "100%" in last
    assert " tokens/s]" in last
    assert "loss: " in last or "late: " in last


def test_the_rate_of_a_resumed_run_is_that_of_the_tokens_since():
    trainer: Any = SimpleNamespace(
        cfg=SimpleNamespace(train_batch_size_samples=100), n_training_samples=5000, n_training_steps=50
    )
    move_bar_every_step(trainer)
    bar = tqdm(total=6000, file=io.StringIO())  # as SAELens starts that of several SAEs: at 0
    for _ in range(10):
        trainer.n_training_samples += 100
        trainer._update_pbar({}, bar)
    assert (bar.initial, bar.n) == (5000, 6000)
    bar.close()
