"""What has been trained is never lost by what comes after, and nothing is deleted that no run has written."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock, Timeout
from sae_lens import SAE

from sae_lens_matryoshka.errors import UserError
from sae_lens_matryoshka.training import trained_saes
from sae_lens_matryoshka.training.output_folders import MARKER_FILENAME, check_output, output_lock, staged_folder
from sae_lens_matryoshka.training.run import train
from tests.tiny_runs import tiny_multi_run, tiny_run

SAMPLES: Any = {"calibration_samples": 300, "measure_samples": 300}


def _write(output: Path, content: str, force: bool = False) -> None:
    with staged_folder(output, force) as staging:
        (staging / "sae_weights.safetensors").write_text(content)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("force", [False, True])
def test_folders_that_other_things_live_in_are_refused(force: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for output in (".", "..", "../..", str(tmp_path), "/", "~"):
        with pytest.raises(FileExistsError, match="is the working directory, a home, a mount point or a folder above"):
            check_output(Path(output).expanduser(), force)
    if Path("/proc").is_dir():
        with pytest.raises(FileExistsError, match="a mount point"):
            check_output(Path("/proc"), force)
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="is a file; choose a folder"):
        check_output(tmp_path / "file", force)


def test_force_replaces_what_a_run_has_written_and_nothing_else(tmp_path: Path):
    output = tmp_path / "out"
    _write(output, "first")
    with pytest.raises(FileExistsError, match="is not empty; choose another with --output or replace it with --force"):
        _write(output, "second")
    _write(output, "second", force=True)
    assert (output / "sae_weights.safetensors").read_text() == "second"
    assert _names(tmp_path) == [".out.lock", "out"]

    (output / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds what no run has written \(notes\.txt\); move it away"):
        _write(output, "third", force=True)
    (output / "notes.txt").unlink()
    (output / ".calibrating-abcd1234").mkdir()  # of a killed run
    (output / ".calibrating-abcd1234" / "cfg.json").touch()
    _write(output, "third", force=True)

    _write(tmp_path / "another", "another run")
    (tmp_path / "another").rename(output / "inner")
    with pytest.raises(FileExistsError, match=r"holds other runs or their checkpoints \(inner\)"):
        _write(output, "fourth", force=True)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.tex").write_text("theirs")
    with pytest.raises(FileExistsError, match=f"is not one that this version has written .no {MARKER_FILENAME}"):
        _write(tmp_path / "theirs", "mine", force=True)
    assert (tmp_path / "theirs" / "thesis.tex").read_text() == "theirs"


@pytest.mark.parametrize("kind", ["link", "empty folder", "scores", "file called as ours"])
def test_whatever_a_run_has_not_written_is_somebodys(kind: str, tmp_path: Path):
    output = tmp_path / "out"
    _write(output, "first")
    (tmp_path / "elsewhere").mkdir()
    if kind == "link":
        (output / "link").symlink_to(tmp_path / "elsewhere")
    elif kind == "empty folder":
        (output / "mine").mkdir()
    elif kind == "scores":  # only runs on synthetic models write such a file
        (output / "scores.csv").write_text("mine")
    else:
        (output / ".calibrating-my-notes").write_text("mine")
    with pytest.raises(FileExistsError, match="holds what no run has written"):
        _write(output, "second", force=True)
    assert len(list(output.iterdir())) == 3


def test_outputs_do_not_lie_in_each_other(tmp_path: Path):
    outer, inner = tmp_path / "out", tmp_path / "out" / "deep" / "inner"
    with (
        ThreadPoolExecutor(1) as other_run,
        output_lock(outer),
        pytest.raises(FileExistsError, match=r"lies in .*/out,"),
    ):
        other_run.submit(_write, inner, "while the outer is trained").result()
    _write(outer, "first")
    with pytest.raises(FileExistsError, match=r"lies in .*/out, the output of another run"):
        _write(inner, "after it")


@pytest.mark.parametrize("name", ["afile/out", "afile/deep/out", "/proc/out", "/proc/deep/out"])
def test_an_output_where_nothing_can_be_made_is_one_sentence(tmp_path: Path, name: str):
    if name.startswith("/proc") and not Path("/proc/self").exists():
        pytest.skip("there is no /proc here")
    (tmp_path / "afile").touch()
    why = "afile is a file" if "afile" in name else "No such file or directory"
    with pytest.raises(UserError, match=rf"The output {tmp_path / name} cannot be made \(.*{why}\); choose another"):
        _write(tmp_path / name, "first")


def test_after_an_error_the_old_output_stands_and_what_was_trained_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    output = tmp_path / "out"
    _write(output, "first")
    with pytest.raises(ZeroDivisionError), staged_folder(output, force=True):
        raise ZeroDivisionError
    assert _names(tmp_path) == [".out.lock", "out"]

    rename = Path.rename

    def fails_for_the_new(self: Path, target: Path) -> Path:
        if "unfinished" in self.name and target == output:
            raise OSError(16, "Device or resource busy")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_for_the_new)
    with pytest.raises(OSError, match="busy"):
        _write(output, "second", force=True)
    assert (output / "sae_weights.safetensors").read_text() == "first"
    (kept,) = tmp_path.glob(".out.unfinished-*")
    assert (kept / "sae_weights.safetensors").read_text() == "second"
    assert f"What a run has trained is kept in {kept}" in caplog.text


def test_what_killed_runs_leave_is_swept_unless_it_is_trained_or_another_outputs(tmp_path: Path):
    for name in (".out.unfinished-abcd1234", ".out.unfinished-trained1", ".out-2.unfinished-abcd1234", ".out.mine"):
        (tmp_path / name).mkdir()
    (tmp_path / ".out.unfinished-trained1" / "sae_weights.safetensors").touch()
    _write(tmp_path / "out", "first")
    assert _names(tmp_path) == [
        ".out-2.unfinished-abcd1234", ".out.lock", ".out.mine", ".out.unfinished-trained1", "out",
    ]  # fmt: skip


def test_two_runs_on_one_output_never_undo_each_other(tmp_path: Path):
    with FileLock(tmp_path / ".out.lock"), pytest.raises(UserError, match="Another run is writing to"):
        _write(tmp_path / "out", "second")
    with output_lock(tmp_path / "out"):  # for as long as a run works on what it has written
        _write(tmp_path / "out", "first")
        with pytest.raises(Timeout):
            FileLock(tmp_path / ".out.lock").acquire(timeout=0)
        (tmp_path / "out" / "sae_weights.safetensors").unlink()
        (tmp_path / "out" / MARKER_FILENAME).unlink()
        (tmp_path / "out").rmdir()
    with staged_folder(tmp_path / "out") as staging:
        (staging / "a").touch()
        (tmp_path / "out").mkdir()  # by somebody who takes no lock
        (tmp_path / "out" / "theirs").touch()
        with pytest.raises(FileExistsError, match="is not empty"):
            check_output(tmp_path / "out", force=False)
        (tmp_path / "out" / "theirs").unlink()
    assert (tmp_path / ".out.lock").is_file()


def test_a_link_is_followed_from_the_start(tmp_path: Path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "out")
    _write(tmp_path / "link", "first")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "out" / "sae_weights.safetensors").read_text() == "first"
    _write(tmp_path / "link", "second", force=True)
    assert (tmp_path / "disk" / "out" / "sae_weights.safetensors").read_text() == "second"


def _breaks(*_: Any) -> Iterator[Any]:
    raise RuntimeError("CUDA out of memory.")


def _is_interrupted(*_: Any) -> Iterator[Any]:
    raise KeyboardInterrupt


@pytest.mark.parametrize("step", ["calibrate_threshold", "measure_levels"])
@pytest.mark.parametrize("several", [False, True])
def test_what_fails_after_training_costs_no_sae_and_is_made_up_for(
    several: bool, step: str, tinystories: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    make = tiny_multi_run if several else tiny_run
    run = make(tinystories, None, training_tokens=12 * 128)
    with monkeypatch.context() as patch:
        patch.setattr(trained_saes, step, _breaks)
        first = train(run, output=tmp_path / "out", **SAMPLES)
    output = first.output
    folders = [output / "early", output / "late"] if several else [output]
    for folder in folders:
        what = "calibrated" if step == "calibrate_threshold" else "measured"
        message = f"The SAE is saved in {folder}, but has not been {what} (CUDA out of memory.); "
        message += "the same command with --resume auto makes up for it."
        assert message in caplog.text
        assert message in [sae.incomplete for sae in first.saes]
        assert SAE.load_from_disk(folder)
        assert not (folder / "levels.csv").exists()

    again = train(run, output=output, resume="auto", **SAMPLES)
    assert not again.was_finished
    assert [sae.path for sae in again.saes] == folders
    for sae in again.saes:
        assert (sae.path / "levels.csv").is_file()
        assert sae.incomplete is None
        assert (sae.calibration is not None) == (step == "calibrate_threshold")  # done once
        if sae.calibration is not None:
            assert sae.levels[-1].l0 == pytest.approx(sae.calibration.l0_after, rel=0.3)
    assert train(run, output=output, resume="auto", **SAMPLES).was_finished
    train(run, output=output, force=True, **SAMPLES)  # all of it is the run's


def test_ctrl_c_after_training_leaves_the_sae(
    tinystories: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(trained_saes, "calibrate_threshold", _is_interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_run(tinystories, None, training_tokens=12 * 128), output=tmp_path / "out", **SAMPLES)
    assert SAE.load_from_disk(tmp_path / "out")
    assert "has not been calibrated (interrupted)" in caplog.text
    assert _names(tmp_path) == [".out.lock", "out"]


def test_a_calibrated_threshold_is_what_is_saved(tinystories: Path, tmp_path: Path):
    caught: list[SAE[Any]] = []
    original = trained_saes.calibrate_threshold
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trained_saes, "calibrate_threshold", lambda sae, *a: caught.append(sae) or original(sae, *a))
        run = tiny_run(tinystories, None, training_tokens=12 * 128)
        output = train(run, output=tmp_path / "out", **SAMPLES).output
    saved = SAE.load_from_disk(output)
    assert saved.threshold.equal(caught[0].threshold)  # type: ignore[arg-type]
    assert saved.cfg.metadata.calibration_samples == 300
    assert not [name for name in os.listdir(output) if name.startswith(".")]


def test_checkpoints_inside_the_output_are_refused_before_training(tinystories: Path, tmp_path: Path):
    for inside in ("", "checkpoints"):
        run = tiny_run(tinystories, tmp_path / "out" / inside, model_name="nobody/nothing")
        with pytest.raises(UserError, match=r"checkpoint_path=.* lies in the output .*; name a folder beside it"):
            train(run, output=tmp_path / "out", **SAMPLES)
    assert list(tmp_path.iterdir()) == []


def test_a_path_through_a_folder_that_is_not_there(tinystories: Path, tmp_path: Path):
    run = tiny_run(tinystories, None, training_tokens=12 * 128)
    result = train(run, output=tmp_path / "nowhere" / ".." / "out", **SAMPLES)
    assert (tmp_path / "out" / "levels.csv").is_file()
    assert result.saes[0].levels


def test_resume_auto_says_what_differs_from_what_is_there(tinystories: Path, tmp_path: Path):
    run = tiny_run(tinystories, None, training_tokens=12 * 128)
    train(run, output=tmp_path / "out", **SAMPLES)
    with pytest.raises(FileExistsError, match="and it was made with other settings of lr, lr_end; choose"):
        train({**run, "lr": 2e-3}, output=tmp_path / "out", resume="auto", **SAMPLES)


def test_a_foreign_file_stays_foreign_after_the_figures_are_made_up_for(
    tinystories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = tiny_run(tinystories, None, training_tokens=12 * 128)
    with monkeypatch.context() as patch:
        patch.setattr(trained_saes, "measure_levels", _breaks)
        train(run, output=tmp_path / "out", **SAMPLES)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    train(run, output=tmp_path / "out", resume="auto", **SAMPLES)
    with pytest.raises(FileExistsError, match=r"no run has written \(notes\.txt\)"):
        train(run, output=tmp_path / "out", force=True, **SAMPLES)
