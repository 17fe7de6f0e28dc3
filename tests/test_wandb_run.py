"""Really logging to wandb, offline: whatever it refuses, the run goes on, and what it takes is there."""

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from sae_lens import SAETrainer

from sae_lens_matryoshka.errors import UserError
from sae_lens_matryoshka.training.caching import cache_activations
from sae_lens_matryoshka.training.run import train
from sae_lens_matryoshka.training.wandb_run import artifact_name
from tests.tiny_runs import tiny_multi_run, tiny_run, tiny_sae

SAMPLES: Any = {"calibration_samples": 200, "measure_samples": 200}
SHORT: Any = {
    "training_tokens": 6 * 128,
    "n_checkpoints": 1,
    "logger": {"log_to_wandb": True, "wandb_log_frequency": 2},
}


@pytest.fixture(autouse=True)
def functions_of_wandb_are_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    wandb.teardown()  # so that it looks anew where it is
    monkeypatch.chdir(tmp_path)  # and writes below
    init, finish = wandb.init, wandb.finish
    yield
    assert wandb.run is None
    assert (wandb.init, wandb.finish) == (init, finish)
    with pytest.raises(wandb.Error, match="You must call"):
        wandb.log({})


def _logged(folder: Path) -> list[bytes]:
    """What the offline runs below a folder hold, which `wandb sync` would send."""
    runs = sorted(folder.glob("wandb/offline-run-*"))
    return [next(run.glob("run-*.wandb")).read_bytes() for run in runs]


@pytest.mark.parametrize("make", [tiny_run, tiny_multi_run])
def test_a_model_folder_whose_name_wandb_refuses(tinystories: Path, tmp_path: Path, make: Any, caplog: Any):
    model = tmp_path / "my model, l=2: \u00fc"
    shutil.copytree(tinystories / "model", model)
    run = make(tinystories, tmp_path / "checkpoints", model_name=str(model), **SHORT)
    with caplog.at_level(logging.WARNING, "sae_lens_matryoshka"):
        train(run, output=tmp_path / "out", **SAMPLES)
    assert "wandb" not in caplog.text
    assert list((tmp_path / "checkpoints").glob("*/[0-9]*"))
    [logged] = _logged(tmp_path)
    for layer in ("1", "2") if make is tiny_multi_run else ("2",):
        name = {"1": "_early", "2": "_late"}[layer] if make is tiny_multi_run else ""
        assert f"my_model__l_2____model.layers.{layer}_128{name}_log_feature_sparsity".encode() in logged
    assert b"metrics/explained_variance" in logged


@pytest.mark.parametrize("make", [tiny_run, tiny_multi_run])
def test_from_an_activation_cache_wandb_is_told_all_but_what_needs_a_model(
    tinystories: Path, tmp_path: Path, make: Any, caplog: Any
):
    logger = {**SHORT["logger"], "eval_every_n_wandb_logs": 1}
    run = make(tinystories, None, **{**SHORT, "logger": logger})
    cache = cache_activations(run, tmp_path / "cache", tokens=4000).folder
    with caplog.at_level("INFO", "sae_lens_matryoshka"):
        train(run, output=tmp_path / "out", activations=cache, calibration_samples=100, measure_samples=100)
    assert "no losses recovered to log to wandb" in caplog.text
    [logged] = _logged(tmp_path)
    assert b"losses/overall_loss" in logged
    assert b"ce_loss_score" not in logged


def test_artifacts_of_two_saes_on_one_hook_have_names_of_their_own(tinystories: Path, tmp_path: Path):
    saes = {"few": tiny_sae(k=4), "many": tiny_sae(k=9)}
    run = tiny_multi_run(tinystories, tmp_path / "checkpoints", saes=saes, hook_names="model.layers.1", **SHORT)
    train(run, output=tmp_path / "out", **SAMPLES)
    [logged] = _logged(tmp_path)
    for name in saes:
        assert f"layers.1_128_{name}_log_feature_sparsity".encode() in logged


def test_names_that_saelens_could_use_are_its_own():
    assert artifact_name("sae_google/gemma-2-2b_blocks.12.hook_resid_post_65536") == (
        "sae_google__gemma-2-2b_blocks.12.hook_resid_post_65536"
    )
    for name in ("x" * 200 + "_end", "sae_/a b/c=d:e_\u00e9_8"):
        wandb.Artifact(artifact_name(name), type="model")  # which raises an error for names that it does not take
    assert artifact_name("x" * 200 + "_end").endswith("x_end")


def _refuse(*_: Any, **__: Any) -> None:
    raise ValueError("wandb does not like this\nat all")


@pytest.mark.parametrize("refused", ["log", "log_artifact", "finish"])
def test_what_wandb_refuses_is_one_warning(
    tinystories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, refused: str
):
    original = getattr(wandb.Run, refused)
    monkeypatch.setattr(wandb.Run, refused, _refuse)
    with caplog.at_level(logging.WARNING, "sae_lens_matryoshka"):
        train(tiny_run(tinystories, tmp_path / "checkpoints", **SHORT), output=tmp_path / "out", **SAMPLES)
    assert (
        caplog.text.count("wandb cannot take all that this run logs (wandb does not like this); training goes on") == 1
    )
    assert (tmp_path / "out" / "cfg.json").is_file()
    if refused == "finish":
        monkeypatch.setattr(wandb.Run, refused, original)
        wandb.finish()


def test_settings_that_wandb_cannot_start_with(tinystories: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    logger = {**SHORT["logger"], "wandb_project": "no/project"}
    with caplog.at_level(logging.WARNING, "sae_lens_matryoshka"):
        train(tiny_run(tinystories, None, **{**SHORT, "logger": logger}), output=tmp_path / "out", **SAMPLES)
    assert "wandb cannot be used (" in caplog.text
    assert "so this run logs nothing there" in caplog.text
    assert (tmp_path / "out" / "cfg.json").is_file()


def test_a_run_that_fails_is_finished_on_wandb(tinystories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(SAETrainer, "step", _refuse)
    with pytest.raises(UserError, match="wandb does not like this"):
        train(tiny_run(tinystories, None, **SHORT), output=tmp_path / "out", **SAMPLES)


def test_every_sae_on_a_synthetic_model_is_a_wandb_run(tmp_path: Path):
    sae = {"architecture": "matryoshka", "d_in": 12, "d_sae": 32, "k": 3, "matryoshka_widths": [4, 32]}
    run = {
        "synthetic_model": {"num_features": 24, "hidden_dim": 12, "hierarchy": {"total_root_nodes": 4}, "seed": 0},
        "sae": sae,
        "saes": {"a": {}, "b": {"k": 4}},
        "training_samples": 1000,
        "batch_size": 100,
        "eval_samples": 500,
        "run_final_eval": False,
        "n_checkpoints": 1,
        "checkpoint_path": str(tmp_path / "checkpoints"),
        "logger": {"log_to_wandb": True, "wandb_log_frequency": 2},
    }
    train(run, output=tmp_path / "out", **SAMPLES)
    assert len(_logged(tmp_path)) == 2
    # SAELens's runner would put the checkpoint of one over that of the other
    assert sorted(path.parent.name for path in (tmp_path / "checkpoints").glob("*/*/[0-9]*")) == ["a", "b"]
