"""Registration with SAELens: repeatable, never over a foreign class, and seen by SAELens's own argument parser."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import sae_lens
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

import sae_lens_matryoshka
from sae_lens_matryoshka import (
    MatryoshkaJumpReLUSAE,
    MatryoshkaJumpReLUSAEConfig,
    MatryoshkaTrainingSAE,
    MatryoshkaTrainingSAEConfig,
)
from sae_lens_matryoshka.registration import INFERENCE_CLASSES, TRAINING_CLASSES
from tests import processes


@pytest.fixture(autouse=True)
def _registries_restored() -> Iterator[None]:
    with mock.patch.dict(SAE_CLASS_REGISTRY), mock.patch.dict(SAE_TRAINING_CLASS_REGISTRY):
        yield


def _assert_registered():
    assert SAE_CLASS_REGISTRY["matryoshka"] == (MatryoshkaJumpReLUSAE, MatryoshkaJumpReLUSAEConfig)
    assert SAE_TRAINING_CLASS_REGISTRY["matryoshka"] == (MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig)
    for registry, classes in ((SAE_CLASS_REGISTRY, INFERENCE_CLASSES), (SAE_TRAINING_CLASS_REGISTRY, TRAINING_CLASSES)):
        for sae_class, config_class in classes:
            assert registry[config_class.architecture()] == (sae_class, config_class)


def test_importing_registers_and_repeating_changes_nothing():
    _assert_registered()
    before = dict(SAE_CLASS_REGISTRY), dict(SAE_TRAINING_CLASS_REGISTRY)
    sae_lens_matryoshka.register()
    importlib.reload(sae_lens_matryoshka)
    assert (SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY) == before
    _assert_registered()


def test_built_in_architectures_are_untouched(tmp_path: Path):
    code = """
import sae_lens.registry as r
import sae_lens
before = dict(r.SAE_CLASS_REGISTRY), dict(r.SAE_TRAINING_CLASS_REGISTRY)
import sae_lens_matryoshka
ours = {"matryoshka", "matryoshka_topk", "matryoshka_standard"}
added = (ours, ours | {"matryoshka_jumprelu"})
for registry, old, new in zip((r.SAE_CLASS_REGISTRY, r.SAE_TRAINING_CLASS_REGISTRY), before, added):
    assert {k: v for k, v in registry.items() if k in old} == old
    assert set(registry) - set(old) == new, set(registry) - set(old)
"""
    done = processes.run(code, tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_reloaded_copy_of_our_class_replaces_the_old_one():
    stale = type("MatryoshkaJumpReLUSAE", (), {"__module__": MatryoshkaJumpReLUSAE.__module__})
    SAE_CLASS_REGISTRY["matryoshka"] = (stale, MatryoshkaJumpReLUSAEConfig)  # type: ignore[assignment]
    sae_lens_matryoshka.register()
    _assert_registered()


@pytest.mark.parametrize("registry", [SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY])
def test_a_foreign_class_is_named_and_neither_registry_changes(registry: dict[str, object]):
    registry["matryoshka"] = (sae_lens.StandardSAE, sae_lens.StandardSAEConfig)
    before = dict(SAE_CLASS_REGISTRY), dict(SAE_TRAINING_CLASS_REGISTRY)
    with pytest.raises(RuntimeError, match=r"already registered by sae_lens\.saes\.standard_sae\.StandardSAE"):
        sae_lens_matryoshka.register()
    assert (SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY) == before


def test_saelens_argument_parser_offers_the_architecture(tmp_path: Path):
    code = """
import sys
from unittest import mock
import sae_lens_matryoshka
from sae_lens_matryoshka.cli.command_line import main
import sae_lens.llm_sae_training_runner as saelens
with mock.patch("sae_lens.load_model.load_model", side_effect=SystemExit("model wanted")):
    main(["saelens", "--architecture", "matryoshka", "--d_in", "64", "--d_sae", "256", "--k", "8",
          "--matryoshka_widths", "16", "64", "256", "--level_weights", "1", "1", "2", "--dataset_path", "x"])
"""
    done = processes.run(code, tmp_path)
    assert done.stderr.strip() == "model wanted"  # so the arguments made a valid config
    bad = processes.run(["saelens", "--architecture", "matryoshkaa"], tmp_path)
    assert bad.returncode != 0
    assert "matryoshka" in bad.stdout + bad.stderr
