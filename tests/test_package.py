"""What is installed: a wheel built from the source distribution, as `pip` and an index get it."""

import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
NO_BACKEND = "No matching distribution found for hatchling"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of this repository, by way of its source distribution."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", str(folder), str(REPOSITORY)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0 and NO_BACKEND in done.stdout + done.stderr:
        pytest.skip("the build backend, hatchling, cannot be had: no package index answers")
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def _metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode())


def test_the_wheel_holds_the_package_and_nothing_else(wheel: zipfile.ZipFile):
    package = REPOSITORY / "sae_lens_matryoshka"
    expected = {path.relative_to(REPOSITORY).as_posix() for path in package.rglob("*.py")}
    expected |= {f"sae_lens_matryoshka/configs/{path.name}" for path in (REPOSITORY / "configs").iterdir()}
    expected.add("sae_lens_matryoshka/py.typed")
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == expected


def test_the_wheel_has_the_licence_and_the_command(wheel: zipfile.ZipFile):
    contents = {name.partition(".dist-info/")[2]: wheel.read(name).decode() for name in wheel.namelist()}
    assert contents["licenses/LICENSE"] == (REPOSITORY / "LICENSE").read_text(encoding="utf-8")
    assert "sae-lens-matryoshka = sae_lens_matryoshka.cli.command_line:main" in contents["entry_points.txt"]


def test_the_metadata_say_whose_it_is_and_where_it_is_from(wheel: zipfile.ZipFile):
    metadata = _metadata(wheel)
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Author"] == "The sae-lens-matryoshka developers"
    assert any(url.startswith("Repository, https://") for url in metadata.get_all("Project-URL", []))
    classifiers = metadata.get_all("Classifier", [])
    assert "Programming Language :: Python :: 3.10" in classifiers
    assert not [classifier for classifier in classifiers if classifier.startswith("License ::")]
    assert metadata.get_payload() == (REPOSITORY / "README.md").read_text(encoding="utf-8")
