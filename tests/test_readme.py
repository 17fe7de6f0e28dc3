"""Every code block of the README does what the README says."""

import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml

from sae_lens_matryoshka.run_files.building import build_runner_configs

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
BLOCKS: list[tuple[str, str]] = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
MODULE = [sys.executable, "-m", "sae_lens_matryoshka"]


def _commands() -> list[list[str]]:
    """The plugin's commands in the README's shell blocks, continued lines joined, installation left out."""
    shell = "\n".join(code for language, code in BLOCKS if language == "bash").replace("\\\n", " ")
    commands = [part.strip() for line in shell.splitlines() for part in line.split("&&")]
    return [
        shlex.split(command.replace(".venv/bin/", ""))[1:]
        for command in commands
        if command.replace(".venv/bin/", "").startswith("sae-lens-matryoshka")
    ]


def _run(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*MODULE, *arguments], cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the README's main command has been run."""
    folder = tmp_path_factory.mktemp("readme")
    assert _commands()[0] == ["train", "synthetic"]
    done = _run(["train", "synthetic"], folder)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Saved to runs/synthetic" in done.stdout
    return folder


def test_every_block_is_covered():
    covered = _python_blocks("synthetic", "target_l0", "levels_in_model", ".bench", "train(cfg")
    assert covered == [code for language, code in BLOCKS if language == "python"]
    assert not [line for code in covered for line in code.splitlines() if line.startswith("#")]
    assert {language for language, _ in BLOCKS} == {"bash", "python", "yaml"}
    assert [command[:2] for command in _commands()] == [
        ["train", "synthetic"],
        ["train", "tinystories"],
        ["train", "tinystories"],
        ["inspect", "runs/stories260K"],
        ["train", "gemma-2-2b"],
        ["train", "gemma-2-2b-sweep"],
        ["train", "gemma-2-2b"],
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


def _run_block(code: str, folder: Path, tinystories: Path | None = None) -> str:
    """What a block of Python prints."""
    environment = os.environ if tinystories is None else {**os.environ, "TINYSTORIES": str(tinystories)}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_python_blocks_that_need_no_model_run(folder: Path):
    printed = [_run_block(code, folder) for code in _python_blocks("synthetic", "target_l0")]
    assert printed == ["[20, 80, 240] tensor([0, 1, 2])\n", "", ""]


def _python_blocks(*texts: str) -> list[str]:
    """The blocks of Python that hold one of some texts."""
    return [code for language, code in BLOCKS if language == "python" and any(text in code for text in texts)]


def test_yaml_blocks_are_run_files():
    for code in [code for language, code in BLOCKS if language == "yaml"]:
        build_runner_configs(yaml.safe_load(code))


def test_training_from_python_ends_with_a_calibrated_sae(tinystories: Path, tmp_path: Path):
    (code,) = _python_blocks("train(cfg")
    widths, l0 = _run_block(code, tmp_path, tinystories).strip().split(" L0 ")
    assert widths == "[32, 96, 224, 480, 1024]"
    assert float(l0) == pytest.approx(16, abs=0.3)


def test_the_local_tinystories_commands_run(tinystories: Path, tmp_path: Path):
    train, inspect, *_, push, evaluate = (
        [argument.replace("$TINYSTORIES", str(tinystories)) for argument in command] for command in _commands()[2:]
    )
    done = _run(train, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "sae: levels of the saved SAE" in done.stdout
    shown = _run(inspect, tmp_path)
    assert shown.returncode == 0
    assert "hook: model.layers.2" in shown.stdout
    _assert_levels_in_the_model_do_what_the_readme_reports(tinystories, tmp_path)
    dry_run = _run(push, tmp_path)  # offline; what pushing does is tested against a local Hub in tests/hub
    assert dry_run.returncode == 0, dry_run.stderr[-2000:]
    assert "## model.layers.2" in dry_run.stdout
    assert f"'{tinystories}/model' is published as 'model'" in dry_run.stdout
    if find_spec("sae_bench") is None:
        pytest.skip("all but the evaluation has run; that needs SAEBench: pip install -e '.[dev,bench]'")
    (code,) = _python_blocks(".bench")
    assert "ours" in _run_block(code, tmp_path, tinystories)
    evaluated = _run(evaluate, tmp_path)
    assert evaluated.returncode == 0, evaluated.stderr[-2000:]
    assert "loss recovered" in evaluated.stdout
    assert (tmp_path / "runs/evaluations/metrics_by_l0.png").is_file()


def _assert_levels_in_the_model_do_what_the_readme_reports(tinystories: Path, folder: Path) -> None:
    (code,) = _python_blocks("levels_in_model")
    hook, *losses = _run_block(code, folder, tinystories).splitlines()
    assert hook == "blocks.2.hook_out torch.Size([1, 403, 2048])"
    unchanged, *levels = [[float(number) for number in line.split(": ")[1].split()] for line in losses]
    replaced, ablated = zip(*levels, strict=True)
    assert list(replaced) == sorted(replaced, reverse=True)
    assert unchanged[0] < replaced[-1] < unchanged[0] + 0.3
    assert ablated[0] > 2 * max(ablated[1:])
    assert all(loss >= unchanged[0] for loss in ablated)


@pytest.mark.parametrize("index", [1, 4, 5, 6])
def test_commands_that_need_the_hub_or_a_gpu_say_so_in_one_sentence(index: int, tmp_path: Path):
    if torch.cuda.is_available() and index > 1:
        pytest.skip("with a GPU these commands only lack the Hub, which the TinyStories command shows")
    done = _run(_commands()[index], tmp_path)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert ("model_name=DIR" if index == 1 else "set device=cpu") in last
    assert "Traceback" not in done.stderr
