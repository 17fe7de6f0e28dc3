"""A line in a cluster's queue: started again when everything is there, a run says so and leaves it alone."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from sae_lens_matryoshka.cli.command_line import main
from sae_lens_matryoshka.errors import ConfigError
from sae_lens_matryoshka.measuring.level_metrics import LevelMetrics
from sae_lens_matryoshka.run_files.building import build_runner_configs
from sae_lens_matryoshka.saved.level_figures import read_level_figures
from sae_lens_matryoshka.saved.summary import summarize_folder
from sae_lens_matryoshka.training.resuming.checkpoints import find_checkpoint
from sae_lens_matryoshka.training.run import train
from sae_lens_matryoshka.untrusted.csv_tables import read_csv, write_csv
from tests.tiny_runs import tiny_multi_run, tiny_run, tiny_sae

SAMPLES: Any = {"calibration_samples": 200, "measure_samples": 300}
SHORT: Any = {"training_tokens": 6 * 128, "lr_warm_up_steps": 0, "lr_decay_steps": 0, "n_checkpoints": 1}


@pytest.fixture(scope="module")
def finished(
    tinystories: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[dict[str, Any], Path, list[list[LevelMetrics]]]]:
    """Runs of one SAE and of several, their outputs, and the levels that were measured; change copies only."""
    folder = tmp_path_factory.mktemp("finished")
    sae = tiny_sae(normalize_activations="expected_average_only_in")
    runs = {
        "one": tiny_run(tinystories, folder / "one_checkpoints", sae=sae, **SHORT),
        "several": tiny_multi_run(tinystories, folder / "several_checkpoints", **SHORT),
    }
    results = {name: train(run, output=folder / name, **SAMPLES) for name, run in runs.items()}
    return {name: (run, folder / name, [sae.levels for sae in results[name].saes]) for name, run in runs.items()}


def _times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("kind", ["one", "several"])
def test_a_finished_run_is_said_to_be_done_and_left_alone(
    finished: Any, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run, output, levels = finished[kind]
    before = _times(output.parent)
    again = train(run, output=output, resume="auto", calibration_samples=200)
    assert again.was_finished
    assert [sae.levels for sae in again.saes] == levels
    assert [sae.path for sae in again.saes] == ([output] if kind == "one" else [output / "early", output / "late"])
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**run, "output_path": str(output)}))
    command = ["train", str(tmp_path / "run.yaml"), "--calibration-samples", "200"]
    assert main([*command, "--resume", "auto"]) == 0
    printed = capsys.readouterr().out
    assert f"Already done: {output}" in printed
    assert "levels of the saved SAE" in printed
    assert main(command) == 1  # without --resume it would train once more
    assert "is not empty" in capsys.readouterr().err
    assert _times(output.parent) == before


def _without_weights(output: Path) -> None:
    next(output.rglob("sae_weights.safetensors")).unlink()


def _of_another_run(output: Path) -> None:
    path = output / "runner_cfg.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lr": 0.5}))


@pytest.mark.parametrize("kind", ["one", "several"])
@pytest.mark.parametrize(
    ("changes", "samples", "damage"),
    [
        ({"lr": 0.5}, 200, None),
        ({"training_tokens": 7 * 128}, 200, None),
        ({}, 0, None),
        ({}, 200, _without_weights),
        ({}, 200, _of_another_run),
    ],
    ids=["lr", "more tokens", "calibration", "no weights", "another run"],
)
def test_the_output_of_another_run_is_refused_as_before(
    finished: Any,
    kind: str,
    changes: dict[str, Any],
    samples: int,
    damage: Callable[[Path], None] | None,
    tmp_path: Path,
):
    run, original, _ = finished[kind]
    output = tmp_path / "out"
    shutil.copytree(original, output)
    if damage is not None:
        damage(output)
    with pytest.raises(FileExistsError, match="is not empty"):
        train({**run, **changes}, output=output, resume="auto", calibration_samples=samples)


@pytest.mark.parametrize("change", ["weights", "no column"])
def test_figures_of_other_weights_count_as_not_measured(finished: Any, change: str, tmp_path: Path):
    run, original, (levels,) = finished["one"]
    output = tmp_path / "out"
    shutil.copytree(original, output)
    assert read_level_figures(output) == summarize_folder(output).figures == levels
    if change == "weights":
        weights = load_file(output / "sae_weights.safetensors")
        weights["W_dec"] *= -3
        save_file(weights, output / "sae_weights.safetensors")
    else:  # as it was written before there was one
        rows = [line.rpartition(",")[0] for line in (output / "levels.csv").read_text().splitlines()]
        (output / "levels.csv").write_text("\n".join(rows))
    assert read_level_figures(output) == summarize_folder(output).figures == []
    again = train(run, output=output, resume="auto", **SAMPLES)
    assert not again.was_finished
    assert (again.saes[0].levels[0].fvu == pytest.approx(levels[0].fvu, rel=0.5)) == (change == "no column")
    assert train(run, output=output, resume="auto", **SAMPLES).was_finished


def test_figures_of_an_older_version_are_shown_as_far_as_they_go(
    finished: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    _, original, (levels,) = finished["one"]
    output = tmp_path / "out"
    shutil.copytree(original, output)
    younger = {"fvu_standardized", "above_half"}
    rows = read_csv(output / "levels.csv")
    assert younger <= rows[0].keys()
    write_csv(output / "levels.csv", [{name: row[name] for name in row if name not in younger} for row in rows])
    assert read_level_figures(output) == [replace(level, **dict.fromkeys(younger)) for level in levels]
    assert main(["inspect", str(output)]) == 0
    assert "│ -  " in capsys.readouterr().out


def test_levels_are_measured_again_on_as_many_samples_as_are_asked_for(finished: Any, tmp_path: Path):
    run, original, _ = finished["one"]
    output = tmp_path / "out"
    shutil.copytree(original, output)
    weights = (output / "sae_weights.safetensors").read_bytes()
    result = train(run, output=output, resume="auto", calibration_samples=200, measure_samples=150)
    assert not result.was_finished
    assert {level.n_samples for level in result.saes[0].levels} == {150}
    assert (output / "sae_weights.safetensors").read_bytes() == weights  # neither trained nor calibrated again
    assert train(run, output=output, resume="auto", calibration_samples=200, measure_samples=150).was_finished


def test_force_makes_a_finished_run_again(finished: Any, tmp_path: Path):
    run, original, _ = finished["one"]
    output = tmp_path / "out"
    shutil.copytree(original, output)
    result = train(run, output=output, resume="auto", force=True, **SAMPLES)
    assert not result.was_finished
    assert result.saes[0].calibration is not None


def test_the_same_run_written_otherwise_is_the_same_run(finished: Any):
    run, output, _ = finished["several"]
    early, late = run["saes"]["early"], run["saes"]["late"]
    shared = {field: value for field, value in early.items() if field != "k"}
    own = {"early": {"k": early["k"]}, "late": {field: value for field, value in late.items() if field not in shared}}
    for rewritten in (
        {**run, "sae": shared, "saes": own},
        {**run, "saes": [{"name": "early", **early}, {"name": "late", **late}], "device": "cpu"},
    ):
        assert train(rewritten, output=output, resume="auto", calibration_samples=200).was_finished
    changed = {**run, "sae": shared, "saes": {**own, "late": {**own["late"], "k": 7}}}
    cfg = build_runner_configs(changed)
    assert not isinstance(cfg, dict)
    [checkpoint] = output.parent.glob("several_checkpoints/*/[0-9]*")
    with pytest.raises(ConfigError, match=r"made with other settings of saes\.late\.k, and"):
        find_checkpoint(cfg, checkpoint)


def test_what_auto_decides_is_said_in_one_line(finished: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run, output, _ = finished["one"]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    command = ["train", str(tmp_path / "run.yaml"), "--resume", "auto", "--calibration-samples", "200"]
    command += ["--measure-samples", "200", "--output", str(tmp_path / "out"), "--set", "n_checkpoints=0"]
    assert main(command) == 0
    [checkpoint] = output.parent.glob("one_checkpoints/*/[0-9]*")
    assert f"Continuing from {checkpoint}.\n" in capsys.readouterr().err
    assert main([*command, "--set", "lr=0.5", "--force"]) == 0
    said = f"Starting afresh, because {checkpoint} was made with other settings of lr, lr_end.\n"
    assert said in capsys.readouterr().err
