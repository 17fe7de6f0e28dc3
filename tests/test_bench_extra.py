"""The extra ``bench``: without it the plugin works and says what is missing; with it tests/bench runs."""

from pathlib import Path

import pytest

from tests import processes


def test_saebench_is_installed():
    pytest.importorskip("sae_bench", reason="tests/bench needs SAEBench: pip install -e '.[dev,bench]'")


def test_without_saebench_the_plugin_imports_and_bench_names_the_extra(tmp_path: Path):
    code = """
import sys
sys.modules["sae_bench"] = None
import sae_lens_matryoshka
from sae_lens_matryoshka.cli.command_line import main
raise SystemExit(main(["evaluate", "nowhere", "--output", "nowhere"]))
"""
    done = processes.run(code, tmp_path)
    assert done.returncode == 1
    assert (
        done.stderr.strip().splitlines()[-1].startswith("error: Evaluations need SAEBench: install it with pip install")
    )
    assert "Traceback" not in done.stderr
