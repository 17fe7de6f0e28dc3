"""What is known of SAELens without importing it is what SAELens says."""

import subprocess
import sys
from pathlib import Path

import pytest
from sae_lens import constants

from sae_lens_matryoshka import saelens_fields, saelens_fields_table
from sae_lens_matryoshka.bench.by_name import CONFIGS
from sae_lens_matryoshka.cli.evaluate import EVALUATIONS
from sae_lens_matryoshka.levels import SAVED_AS
from sae_lens_matryoshka.saes.kinds import KINDS
from sae_lens_matryoshka.saved import checks


def test_the_table_is_current():
    """If it is not: ``python -m sae_lens_matryoshka.saelens_fields``, then ``ruff format``."""
    current = saelens_fields.tables()
    assert saelens_fields_table.CONFIGS == current.configs
    assert saelens_fields_table.TRAINING == current.training
    assert saelens_fields_table.SAVED == current.saved


def test_names_and_data_types_are_saelens_own():
    assert checks.CFG_FILENAME == constants.SAE_CFG_FILENAME
    assert checks.WEIGHTS_FILENAME == constants.SAE_WEIGHTS_FILENAME
    assert checks.DTYPES == constants.DTYPE_MAP
    assert {plain: config.architecture() for plain, (_, config) in KINDS.items()} == SAVED_AS
    assert [*CONFIGS, "sparse_probing_sae_probes"] == list(EVALUATIONS)  # whose config takes long to import


SLOW = {"torch", "sae_lens", "transformers", "transformer_lens", "datasets", "wandb", "pandas", "huggingface_hub"}
CHECK = """
import sys
from pathlib import Path
sys.argv = ["sae-lens-matryoshka", *{arguments!r}]
from sae_lens_matryoshka.cli.command_line import main
try:
    code = main()
except SystemExit as error:
    code = error.code
print(code, *sorted({slow!r} & sys.modules.keys()))
"""


def _run(folder: Path, *arguments: str) -> tuple[str, list[str], str]:
    """Exit code of the command line in a process of its own, which slow packages it has imported, and what it says."""
    code = CHECK.format(arguments=list(arguments), slow=SLOW)
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    exit_code, *imported = done.stdout.splitlines()[-1].split()
    return exit_code, imported, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--help"], "usage: sae-lens-matryoshka"),
        (["train", "--help"], "--set KEY.SUB=VALUE"),
        (["--version"], "."),
        (["trian"], "invalid choice: 'trian'"),
        (["train", "nowhere.yaml"], "There is no run file 'nowhere.yaml'"),
        (["train", "gemma-2-2b", "--set", "sae.kk=3"], "did you mean 'k'?"),
        (["train", "gemma-2-2b", "--set", "sae.architecture=matrioshka"], "did you mean 'matryoshka'?"),
        (["train", "gemma-2-2b", "--set", "lr=fast"], "lr='fast' must be float"),
        (["train", "gemma-2-2b", "--set", "training_tokens=-5"], "training_tokens=-5 must be at least 1"),
        (["train", "--measure-samples", "0"], "--measure-samples 0 must be at least 1"),
        (["inspect", "nowhere"], "There is no saved SAE at nowhere"),
        (["push", "nowhere", "a/b"], "There is nothing at nowhere"),
        (["evaluate", "x", "--output", "out", "--evals", "tp"], "There is no evaluation 'tp'"),
    ],
)
def test_mistakes_are_told_without_importing_anything_slow(arguments: list[str], message: str, tmp_path: Path):
    exit_code, imported, said = _run(tmp_path, *arguments)
    assert exit_code == ("0" if message in ("usage: sae-lens-matryoshka", "--set KEY.SUB=VALUE", ".") else exit_code)
    assert not imported
    assert message in said


def test_a_saved_sae_is_shown_without_importing_saelens(tmp_path: Path, matryoshka_sae: object):
    matryoshka_sae.save_model(tmp_path / "deep" / "down" / "sae")  # type: ignore[attr-defined]
    exit_code, imported, said = _run(tmp_path, "inspect", "deep")
    assert exit_code == "0"
    assert imported == ["torch"]
    assert "deep/down/sae (jumprelu)" in said
