"""Files from somebody else: what is in them is bounded, printed and written as text, and at worst refused."""

import csv
import json
import re
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_lens_matryoshka.cli.command_line import main
from sae_lens_matryoshka.errors import MAX_MESSAGE, ConfigError, UserError
from sae_lens_matryoshka.run_files.reading import read_run_file
from sae_lens_matryoshka.saved.checks import read_json
from sae_lens_matryoshka.untrusted.csv_tables import read_csv, write_csv
from sae_lens_matryoshka.untrusted.terminal import printable
from tests.conftest import random_matryoshka_sae

_NINE = "[*{0},*{0},*{0},*{0},*{0},*{0},*{0},*{0},*{0}]"
_LETTERS = list(zip("abcdefghijkl", "bcdefghijklm", strict=True))
BOMB = "saes: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(f"{new}: &{new} {_NINE.format(old)}\n" for old, new in _LETTERS)
MERGED = "saes: &a {x: 1}\n" + "".join(f"{new}: &{new} {{<<: {_NINE.format(old)}}}\n" for old, new in _LETTERS)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (BOMB, "unfolds into more than 100,000 values"),
        (MERGED, "unfolds into more than 100,000 values"),
        ("saes: &a [*a]", "nested more than 100 deep"),
        ("saes: " + "[" * 200 + "]" * 200, "nested more than 100 deep"),
        ("lr: 2024-99-99", "month must be in 1..12"),
        ("lr: " + "9" * 5000, "Exceeds the limit"),
    ],
)
def test_a_run_file_that_unfolds_is_refused_at_once(tmp_path: Path, text: str, reason: str):
    (tmp_path / "run.yaml").write_text(text)
    started = time.process_time()
    with pytest.raises(ConfigError, match=reason) as error:
        read_run_file(tmp_path / "run.yaml")
    assert time.process_time() - started < 2
    assert len(str(error.value)) < 500
    assert "\n" not in str(error.value)
    value = text.partition(" ")[2].replace("\n", " ")
    if text not in (BOMB, MERGED):  # of several lines
        with pytest.raises(ConfigError, match="is not valid YAML"):
            read_run_file("synthetic", [f"lr={value}"])


@pytest.mark.parametrize("index", ["²", "9" * 400, "9" * 5000, "-1", "٣"])
def test_what_only_looks_like_a_number_is_one_sentence(index: str):
    with pytest.raises(ConfigError, match=r"^The setting .* needs an index from 0 to 1 or a name .* in place of"):
        read_run_file("synthetic", [f"saes.{index}.k=3"])


@pytest.mark.parametrize("option", ["--max-buffer-gb=nan", "--max-buffer-gb=inf", "--max-buffer-gb=²"])
def test_sizes_are_finite_numbers(option: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["train", option])
    assert "argument --max-buffer-gb: " in capsys.readouterr().err


def test_json_that_is_nested_too_deeply_is_refused(tmp_path: Path):
    for depth in (200, 100_000):
        (tmp_path / "cfg.json").write_text('{"a":' + "[" * depth + "]" * depth + "}")
        with pytest.raises(UserError, match=r"cfg.json cannot be read: .*(deep|recursion)"):
            read_json(tmp_path / "cfg.json")


def test_a_value_as_long_as_a_file_is_not_repeated_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "run.yaml").write_text(f"sae: {'x' * 1_000_000}")
    assert main(["train", str(tmp_path / "run.yaml")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: sae='xxx")
    assert error.endswith("must be a mapping of SAE config fields.\n")
    assert len(error) <= MAX_MESSAGE + 20


def test_what_an_sae_says_of_itself_is_printed_as_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    sae = random_matryoshka_sae([3, 8])
    sae.cfg.metadata.model_name = "[/b][link=https://evil.example]:smile:\x1b[2J\x9b2J\u202etxt\ud800"
    folder = tmp_path / "an[" / "b]"  # in the table's title: an[/b]
    sae.save_model(folder)
    assert main(["inspect", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert f"{folder}(jumprelu)" in re.sub(r"\s+", "", printed)
    assert r"model: [/b][link=https://evil.example]:smile:\x1b[2J\x9b2J\u202etxt\ud800" in printed
    (folder / "cfg.json").write_text(json.dumps({"architecture": "\x1b[2J[/b]"}))
    assert main(["inspect", str(folder)]) == 1
    error = capsys.readouterr().err
    assert "\\x1b[2J[/b]" in error
    assert "\x1b" not in error


def test_a_run_with_names_that_other_programs_would_obey(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    names = ["[b]$_$", "=1+1", "_hidden"]
    run = {
        "synthetic_model": {"num_features": 24, "hidden_dim": 12, "seed": 0},
        "sae": {"architecture": "matryoshka", "d_in": 12, "d_sae": 32, "k": 3, "matryoshka_widths": [4, 32]},
        "saes": {name: {} for name in names},
        "training_samples": 1000, "batch_size": 500, "eval_samples": 500, "run_final_eval": False,
        "checkpoint_path": None, "logger": {"log_to_wandb": False},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(json.dumps(run))
    output = tmp_path / "out[" / "b]"
    few = ["--calibration-samples", "500", "--measure-samples", "500"]
    assert main(["train", str(tmp_path / "run.yaml"), "--output", str(output), *few]) == 0
    printed = capsys.readouterr().out
    for name in names:
        assert f"{name}: threshold moved" in printed
        assert f"│ {name} " in printed
    assert f"Saved to {output}" in printed
    assert [row["sae"] for row in read_csv(output / "scores.csv")] == names
    with (output / "scores.csv").open(newline="") as file:
        assert [row["sae"] for row in csv.DictReader(file)] == ["[b]$_$", "'=1+1", "_hidden"]
    assert (output / "scores.png").stat().st_size > 10_000


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), min_size=1))
def test_tables_hold_no_formulas_and_are_read_back_unchanged(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
):
    path = tmp_path_factory.getbasetemp() / "table.csv"
    rows = [{"name": text, "value": -1.5} for text in texts]
    write_csv(path, rows)
    with path.open(newline="", encoding="utf-8") as file:
        cells = list(csv.DictReader(file))
    assert not any(cell["name"].startswith(("=", "+", "-", "@", "\t", "\r")) for cell in cells)
    assert {cell["value"] for cell in cells} == {"-1.5"}
    assert [row["name"] for row in read_csv(path)] == texts


@given(st.text(st.characters()))
def test_nothing_that_cannot_be_seen_is_printed(text: str):
    assert all(character.isprintable() for character in printable(text) if character not in "\n\t")
    assert printable(printable(text)) == printable(text)
    printable(text).encode()
