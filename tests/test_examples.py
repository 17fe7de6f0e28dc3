"""The notebook runs from top to bottom and shows what its text says; what is stored in it came from such a run."""

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "examples" / "levels.ipynb"


@pytest.fixture(scope="module")
def stored() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    folder = tmp_path_factory.mktemp("notebook")
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook


def _printed(notebook: Any) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


def _pictures(notebook: Any) -> int:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_the_notebook_shows_what_it_says(executed: Any):
    printed = _printed(executed)
    assert "[20, 80, 240] tensor([0, 1, 2])" in printed
    unexplained = [float(value) for value in re.findall(r"variance unexplained ([\d.]+)", printed)]
    assert len(unexplained) == 3
    assert unexplained == sorted(unexplained, reverse=True)
    found = re.search(r"level 0 has a latent for (\d+) of 20 parents", printed)
    assert found
    assert int(found.group(1)) >= 12
    assert "LevelJumpReLUSAE 20 True" in printed
    assert _pictures(executed) == 1


def test_what_is_stored_is_what_its_code_prints(stored: Any, executed: Any):
    # to the digits that another machine's rounding may change
    shape = [re.sub(r"-?\d+\.?\d*(e-\d+)?", "#", _printed(notebook)) for notebook in (stored, executed)]
    assert shape[0] == shape[1]
    assert _pictures(stored) == 1


def test_the_stored_notebook_is_clean(stored: Any):
    nbformat.validate(stored)
    numbers = [cell.execution_count for cell in stored.cells if cell.cell_type == "code"]
    assert numbers == list(range(1, len(numbers) + 1))
    assert not re.search(r"/(home|root|tmp|Users|work)/|C:\\\\", NOTEBOOK.read_text(encoding="utf-8"))
