"""The documentation's site builds without a warning, and every public name has a page with its docstring."""

import importlib
import re
import subprocess
import sys
from html import unescape
from importlib.util import find_spec
from inspect import getdoc
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
MODULES = ["sae_lens_matryoshka", "sae_lens_matryoshka.hub", "sae_lens_matryoshka.bench"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def _words(html: str) -> str:
    return " ".join(re.sub(r"[`:]", "", unescape(re.sub(r"<[^>]+>", "", html))).split())


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_has_its_page(site: Path, module: str):
    if module.endswith(".bench") and find_spec("sae_bench") is None:
        pytest.skip("needs SAEBench: pip install -e '.[dev,bench]'")
    imported = importlib.import_module(module)
    assert imported.__all__
    for name in imported.__all__:
        page = (site / "api" / module / name / "index.html").read_text(encoding="utf-8")
        assert f'id="{module}.{name}"' in page
        first = (getdoc(getattr(imported, name)) or "").split("\n\n")[0]
        assert _words(first), f"{module}.{name} has no docstring"
        # Markdown reads what stands between backticks as code, and :class:`x` as x
        expected = " ".join(re.sub(r":\w+:(?=`)|[`:*]", "", first).split())
        assert expected in _words(page), f"the page of {module}.{name} lacks: {expected}"


def test_the_pages_are_the_files_of_the_repository(site: Path):
    guide = (site / "index.html").read_text(encoding="utf-8")
    for heading in re.findall(r"^## (.+)$", (REPOSITORY / "README.md").read_text(encoding="utf-8"), re.MULTILINE):
        assert f">{heading}<" in unescape(guide)
    for link in ("docs/variants/", "entry_points/#behaviour-of-saebench-to-know-about", "benchmarks/"):
        assert f'href="{link}"' in guide
    assert (site / "docs/synthetic_scores.png").is_file()
    into_the_repository = re.findall(r'href="https://github.com/sae-lens-matryoshka/[\w-]+/blob/main/([^"]+)"', guide)
    assert "configs/synthetic.yaml" in into_the_repository
    assert all((REPOSITORY / path).exists() for path in into_the_repository)


def test_nothing_is_asked_of_other_servers(site: Path):
    pages = list(site.rglob("*.html"))
    assert pages
    for page in pages:
        html = page.read_text(encoding="utf-8")
        assert not re.findall(r'<(?:script|img|link)\b[^>]*(?:src|href)="https?://(?!github\.com)[^"]*"', html), page
