"""Every code block of the README does what the README says; its run on TinyStories is in test_real_run.py."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from sae_lens_matryoshka.run_files.building import build_runner_configs
from tests import processes
from tests.readme import BLOCKS, commands, python_blocks, run_block


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the README's main command has been run."""
    folder = tmp_path_factory.mktemp("readme")
    assert commands()[0] == ["train", "synthetic"]
    command = [sys.executable, "-m", "sae_lens_matryoshka", "train", "synthetic"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Saved to runs/synthetic" in done.stdout
    return folder


def test_every_block_is_covered():
    covered = python_blocks("synthetic", "target_l0", "levels_in_model", ".bench", "train(cfg")
    assert covered == [code for language, code in BLOCKS if language == "python"]
    assert not [line for code in covered for line in code.splitlines() if line.startswith("#")]
    assert {language for language, _ in BLOCKS} == {"bash", "python", "yaml"}
    assert [command[:2] for command in commands()] == [
        ["train", "synthetic"],
        ["train", "tinystories"],
        ["train", "tinystories"],
        ["inspect", "runs/stories260K"],
        ["look-at-activations", "gemma-3-270m"],
        ["train", "gemma-3-270m"],
        ["train", "gemma-2-2b"],
        ["train", "gemma-2-2b-sweep"],
        ["train", "gemma-2-2b"],
        ["cache", "gemma-3-270m"],
        ["train", "gemma-3-270m"],
        ["push", "runs/stories260K"],
        ["evaluate", "runs/stories260K"],
    ]


def test_the_main_job_shows_the_effect_that_the_readme_reports(folder: Path):
    rows = [line.split(",") for line in (folder / "runs/synthetic/scores.csv").read_text().splitlines()]
    scores = {row[0]: dict(zip(rows[0][1:], map(float, row[1:]), strict=True)) for row in rows[1:]}
    matryoshka, batchtopk = scores["matryoshka"], scores["batchtopk"]
    assert matryoshka["parent_recovery"] > batchtopk["parent_recovery"] + 0.3
    assert matryoshka["absorption"] < batchtopk["absorption"] - 0.15
    assert matryoshka["mcc"] > batchtopk["mcc"]
    assert matryoshka["f1"] > batchtopk["f1"]


def test_python_blocks_that_need_no_model_run(folder: Path):
    printed = [run_block(code, folder) for code in python_blocks("synthetic", "target_l0")]
    assert printed == ["[20, 80, 240] tensor([0, 1, 2])\n", "", ""]


def test_yaml_blocks_are_run_files():
    for code in [code for language, code in BLOCKS if language == "yaml"]:
        build_runner_configs(yaml.safe_load(code))


def test_training_from_python_ends_with_a_calibrated_sae(tinystories: Path, tmp_path: Path):
    (code,) = python_blocks("train(cfg")
    widths, l0 = run_block(code, tmp_path, tinystories).strip().split(" L0 ")
    assert widths == "[32, 96, 224, 480, 1024]"
    assert float(l0) == pytest.approx(16, abs=0.3)


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        (1, "model_name=DIR"),
        (4, "model_name=DIR"),
        (5, "model_name=DIR"),
        (6, "set device=cpu"),
        (7, "set device=cpu"),
        (8, "set device=cpu"),
        (9, "model_name=DIR"),
        (10, "caches/gemma-3-270m is no folder"),
    ],
)
def test_commands_that_need_the_hub_or_a_gpu_say_so_in_one_sentence(index: int, expected: str, tmp_path: Path):
    if torch.cuda.is_available() and index > 1:
        pytest.skip("with a GPU these commands only lack the Hub, which the TinyStories command shows")
    done = processes.run(commands()[index], tmp_path)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert expected in last
    assert "Traceback" not in done.stderr
