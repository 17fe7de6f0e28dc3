"""The command line as a user meets it: exit codes, one sentence for a mistake, tables for a result."""

import io
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sae_lens import TrainingSAE, TrainingSAEConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import SAEMetadata

from sae_lens_matryoshka import (
    MatryoshkaSAE,
    MatryoshkaStandardTrainingSAEConfig,
    MatryoshkaTopKTrainingSAEConfig,
    MatryoshkaTrainingSAE,
    MatryoshkaTrainingSAEConfig,
)
from sae_lens_matryoshka.cli.command_line import main
from sae_lens_matryoshka.saved.level_figures import LevelMetrics, figure_cells, levels_table
from sae_lens_matryoshka.training import trained_saes
from sae_lens_matryoshka.untrusted.terminal import PlainConsole

QUICK = [
    "training_samples=2000",
    "lr_decay_steps=0",
    "eval_samples=500",
    "synthetic_model.orthogonalization.num_steps=5",
]


def _train(*arguments: str) -> int:
    settings = [part for setting in QUICK for part in ("--set", setting)]
    return main(["train", *settings, "--calibration-samples", "2000", "--measure-samples", "2000", *arguments])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_the_very_end_is_quiet(tmp_path: Path, number: signal.Signals):
    program = f"""
import atexit, os, sys
sys.argv = ["sae-lens-matryoshka", "inspect", "nothing"]
from sae_lens_matryoshka.cli.command_line import main
atexit.register(os.kill, os.getpid(), {int(number)})
sys.exit(main())
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_train_ends_with_tables_and_where_the_saes_lie(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "out"
    assert _train("--output", str(output)) == 0
    printed = capsys.readouterr().out
    assert "matryoshka: levels of the saved SAE" in printed
    assert re.search(r"│ 2 +│ 240 +│ \d", printed)
    assert re.search(r"│ batchtopk +│ 0\.\d+ +│ 0\.\d+", printed)
    assert f"Saved to {output}" in printed
    assert MatryoshkaSAE.load_from_disk(output / "matryoshka").widths == [20, 80, 240]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere.yaml"], "error: There is no run file 'nowhere.yaml'"),
        (["train", "--set", "lrr=3"], "lrr is not a field of SAELens's SyntheticSAERunnerConfig; did you mean 'lr'?"),
        (["train", "--set", "saes.0.matryoshka_widths=[80, 20, 240]"], "20 comes after 80; use [20, 80, 240]"),
        (
            ["train", "--set", "saes.matryoshka.d_in=95"],
            "saes.matryoshka.d_in=95, but the synthetic model's activations",
        ),
        (["train", "--set", "output_path=null"], "output_path=None: train writes what it has trained"),
        (["train", "--set", "saes.matryoshka.topk=1", "--unset", "saes.1.k"], "--unset saes.matryoshka.topk takes it"),
        (["train", "--unset", "saes.batchtopk.kk"], "there is no such field to take out; there are name, architecture"),
        (["train", "--resume", "auto"], "cannot be resumed"),
        (["train", "--keep-checkpoints", "2"], "--keep-checkpoints cannot be used on a synthetic model"),
        (["train", "--no-exact-resume"], "--no-exact-resume cannot be used on a synthetic model"),
        (["train", "--max-buffer-gb", "1"], "--max-buffer-gb cannot be used on a synthetic model"),
        (["train", "--max-buffer-gb", "-1"], "--max-buffer-gb -1 must be at least 0"),
        (["train", "--max-buffer-gb", "1", "--no-exact-resume"], "--max-buffer-gb is for checkpoints that hold the"),
        (["train", "--set", "logger.wandb_id=x"], "logger.wandb_id='x' is one id, but each of saes"),
        (["train", "--calibration-samples", "-1"], "--calibration-samples -1 must be at least 0"),
        (["train", "--measure-samples", "0"], "--measure-samples 0 must be at least 1"),
        (
            [
                "train",
                "--set",
                "saes={t: {architecture: topk, d_in: 96, d_sae: 9, k: 5}}",
                "--calibration-samples",
                "9",
            ],
            "--calibration-samples 9 is for the running threshold of BatchTopK, which topk has none of",
        ),
        (
            ["train", "--set", "saes={g: {architecture: gated, d_in: 96, d_sae: 9}}", "--measure-samples", "9"],
            "--measure-samples 9 is for SAEs saved as jumprelu, topk, standard, which gated is not",
        ),
        (["inspect", "nowhere"], "There is no saved SAE at nowhere (no cfg.json); for a Hub repository"),
        (["inspect", "nobody/nothing", "--id", "x"], "error: "),
    ],
)
def test_mistakes_are_one_sentence_and_a_non_zero_exit_code(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_queue_sees_that_measuring_has_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def breaks(*_: object) -> None:
        raise RuntimeError("CUDA out of memory.")

    monkeypatch.setattr(trained_saes, "measure_levels", breaks)
    assert _train("--output", str(tmp_path / "out")) == 1
    shown = capsys.readouterr()
    assert f"Saved to {tmp_path / 'out'}" in shown.out
    assert (
        "error: Not everything could be made of matryoshka, batchtopk; the warnings above say what and why."
        in shown.err
    )


def test_a_non_empty_output_folder_is_refused_without_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "work").write_text("precious")
    assert main(["train", "--output", str(tmp_path)]) == 1
    assert "is not empty; choose another with --output or replace it with --force" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["trian"], ["train", "a", "b"], ["train", "--outputt", "x"]])
def test_unknown_arguments_show_the_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    assert "usage: sae-lens-matryoshka" in capsys.readouterr().err


def test_inspect_shows_levels_and_origin(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    sae = MatryoshkaTrainingSAE(MatryoshkaTrainingSAEConfig(6, 20, k=3, matryoshka_widths=[5, 20]))
    sae.topk_threshold += 0.25
    sae.cfg.metadata.model_name, sae.cfg.metadata.hook_name = "some/model", "blocks.3.hook_resid_post"
    sae.save_inference_model(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"│ 1 +│ 20 +│ 15 +│ 0.25 / 0.25 / 0.25 +│", printed)
    for fact in ("trained as: matryoshka", "k: 3", "model: some/model", "hook: blocks.3.hook_resid_post"):
        assert fact in printed


@pytest.mark.parametrize(
    ("config", "fires"),
    [
        (MatryoshkaTopKTrainingSAEConfig(6, 20, k=8, matryoshka_widths=[5, 20]), ("the 5 largest", "the 8 largest")),
        (MatryoshkaStandardTrainingSAEConfig(6, 20, matryoshka_widths=[5, 20]), ("above 0", "above 0")),
    ],
)
def test_inspect_says_what_fires_without_thresholds(
    config: TrainingSAEConfig, fires: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    sae: TrainingSAE = get_sae_training_class(config.architecture())[0](config)
    sae.save_inference_model(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for level, (new, rule) in enumerate(zip((5, 15), fires, strict=True)):
        assert re.search(rf"│ {level} +│ [0-9]+ +│ {new} +│ {rule} +│", printed)


def test_inspect_asks_for_widths_where_there_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    plain = MatryoshkaSAE.from_sae(
        MatryoshkaTrainingSAE(MatryoshkaTrainingSAEConfig(6, 20, k=3, matryoshka_widths=[5, 20]))
    ).at_level(-1)
    plain.cfg.metadata = SAEMetadata()
    plain.save_model(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 1
    assert "pass them" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path), "--widths", "10,20"]) == 0
    assert "10" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path), "--widths", "ten"]) == 1
    assert "whole numbers separated by commas" in capsys.readouterr().err


def test_a_damaged_file_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    sae = MatryoshkaTrainingSAE(MatryoshkaTrainingSAEConfig(6, 20, k=3, matryoshka_widths=[5, 20]))
    weights, _ = sae.save_inference_model(tmp_path)
    weights.write_bytes(weights.read_bytes()[:100])
    assert main(["inspect", str(tmp_path)]) == 1
    assert "is truncated or damaged" in capsys.readouterr().err


def test_interruption_is_exit_code_130(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "manual_seed", interrupt)
    assert _train("--output", str(tmp_path / "out")) == 130
    assert not (tmp_path / "out").exists()


def test_no_number_of_a_table_is_cut_off_without_a_terminal(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    level = LevelMetrics(
        level=0, width=65_536, l0=123.45, fvu=0.1234, fvu_standardized=0.5678, dead=12_345, dense=1234, above_half=123,
        n_samples=100_000,
    )  # fmt: skip
    printed = io.StringIO()
    PlainConsole(file=printed).print(levels_table([level], "levels of an SAE with a name that is not short at all"))
    for cell in figure_cells(level):
        assert cell in printed.getvalue()
