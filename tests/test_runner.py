"""Whole runs through SAELens's runners: real TinyStories, synthetic data, several SAEs, interruption and resuming."""

import csv
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, JumpReLUSAE
from sae_lens.synthetic import SyntheticModel, SyntheticModelConfig
from safetensors.torch import load_file

from sae_lens_matryoshka import MatryoshkaSAE
from sae_lens_matryoshka.errors import ConfigError
from sae_lens_matryoshka.run_files.building import build_runner_configs
from sae_lens_matryoshka.run_files.reading import read_run_file
from sae_lens_matryoshka.training.run import train
from sae_lens_matryoshka.training.sample_pool import SamplePool
from tests import processes

SYNTHETIC: dict[str, Any] = {
    "synthetic_model": {
        "num_features": 24,
        "hidden_dim": 12,
        "hierarchy": {"total_root_nodes": 4, "branching_factor": 5, "max_depth": 1},
        "seed": 0,
    },
    "saes": [
        {"architecture": "matryoshka", "d_in": 12, "d_sae": 32, "k": 3, "matryoshka_widths": [4, 32]},
        {"architecture": "batchtopk", "d_in": 12, "d_sae": 32, "k": 3},
    ],
    "training_samples": 20_000,
    "batch_size": 500,
    "lr": 3e-3,
    "eval_samples": 2000,
    "run_final_eval": False,
    "checkpoint_path": None,
    "logger": {"log_to_wandb": False},
}


def _tinystories_run(tinystories: Path, *settings: str) -> dict[str, Any]:
    return read_run_file(
        "tinystories",
        [
            f"model_name={tinystories / 'model'}",
            f"dataset_path={tinystories / 'data'}",
            "hook_name=model.layers.2",
            "streaming=false",
            "sae.d_in=64",
            "sae.d_sae=2048",
            "sae.k=16",
            "sae.matryoshka_widths=[64, 192, 448, 960, 2048]",
            "training_tokens=400_000",
            "lr=1e-2",
            "lr_warm_up_steps=0",
            "lr_decay_steps=80",
            "dead_feature_window=20",
            "checkpoint_path=null",
            "device=cpu",
            *settings,
        ],
    )


def test_saelens_own_training_is_what_it_would_be_without_us(tinystories: Path, tmp_path: Path):
    """Same seed and settings through SAELens's runner alone: the same weights, rounding aside."""
    from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner

    from sae_lens_matryoshka.run_files.building import build_runner_configs

    run = _tinystories_run(
        tinystories, "training_tokens=10240", "lr_decay_steps=0", "sae.d_sae=256", "sae.matryoshka_widths=[32,256]"
    )
    trained = train(run, output=tmp_path / "ours", calibration_samples=0, measure_samples=2048).output
    cfg = build_runner_configs({**run, "output_path": None})
    assert isinstance(cfg, LanguageModelSAERunnerConfig)
    torch.manual_seed(42)
    alone = LanguageModelSAETrainingRunner(cfg).run()
    expected, ours = MatryoshkaSAE.from_sae(alone).W_dec, MatryoshkaSAE.load_from_disk(trained).W_dec
    # Adam's first steps turn rounding of gradients near 0 (its fused kernel rounds otherwise) into whole steps
    assert (ours - expected).norm() / expected.norm() < 1e-2


def test_several_saes_in_one_pass(tinystories: Path, tmp_path: Path):
    run = _tinystories_run(tinystories, "training_tokens=40960", "lr_decay_steps=10")
    sae = {**run.pop("sae"), "d_sae": 256, "matryoshka_widths": [32, 256]}
    run = {
        **{key: value for key, value in run.items() if key not in ("hook_name", "is_dataset_tokenized")},
        "hook_names": "model.layers.2",
        "saes": [{**sae, "k": 4}, {**sae, "k": 8}],
    }
    result = train(run, output=tmp_path / "out", calibration_samples=20_000, measure_samples=20_000)
    assert [trained.name for trained in result.saes] == ["matryoshka_k4", "matryoshka_k8"]
    for trained, k in zip(result.saes, (4, 8), strict=True):
        assert trained.path == tmp_path / "out" / f"matryoshka_k{k}"
        assert trained.calibration is not None
        assert trained.calibration.l0_after == pytest.approx(k)
        assert trained.levels[-1].l0 == pytest.approx(k, rel=0.05)
        assert MatryoshkaSAE.load_from_disk(trained.path).widths == [32, 256]
    runner_cfg = json.loads((tmp_path / "out" / "runner_cfg.json").read_text())
    assert runner_cfg["output_path"] == str(tmp_path / "out")


def test_a_synthetic_run_compares_its_saes(tmp_path: Path):
    result = train(SYNTHETIC, output=tmp_path / "out", calibration_samples=5000, measure_samples=5000)
    assert [trained.name for trained in result.saes] == ["matryoshka_k3", "batchtopk_k3"]
    for trained in result.saes:
        assert trained.scores is not None
        assert trained.scores.l0 == pytest.approx(3, rel=0.1)
        assert isinstance(SAE.load_from_disk(trained.path), JumpReLUSAE)
    with (tmp_path / "out" / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["sae"] for row in rows] == ["matryoshka_k3", "batchtopk_k3"]
    assert float(rows[0]["mcc"]) == pytest.approx(result.saes[0].scores.mcc)  # type: ignore[union-attr]
    assert (tmp_path / "out" / "scores.png").read_bytes().startswith(b"\x89PNG")


def test_a_pool_of_samples_is_shared_by_all_saes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[int] = []
    draw = SyntheticModel.sample
    monkeypatch.setattr(SyntheticModel, "sample", lambda self, n: asked.append(n) or draw(self, n))
    result = train(SYNTHETIC, output=tmp_path / "out", calibration_samples=2000, measure_samples=2000, sample_pool=9000)
    assert sum(asked[:3]) == 9000  # before the levels are measured on fresh ones
    assert asked[:3] == [4096, 4096, 808]
    drawn_for_levels = asked[3:]
    assert sum(drawn_for_levels) < 2 * (2 * 2000 + 2 * SYNTHETIC["batch_size"])  # not 2 * training_samples
    for trained in result.saes:
        sae = SAE.load_from_disk(trained.path)
        assert sae.cfg.metadata.sample_pool == 9000
        assert trained.scores is not None
        assert trained.scores.l0 == pytest.approx(3, rel=0.3)


def test_every_sae_gets_the_same_samples_of_a_pool_and_every_epoch_all_of_them():
    world = SyntheticModel(SyntheticModelConfig(num_features=5, hidden_dim=4, seed=3))
    pool = SamplePool(world, 10)
    pool.samples = torch.randn(10, 4)  # of which no two are alike
    batches = [pool.activation_generator(3) for _ in range(6)]
    for epoch in (batches[:3], batches[3:]):
        rows = [int((pool.samples == sample).all(1).nonzero()) for sample in torch.cat(epoch)]
        assert len(set(rows)) == 9
    assert not torch.cat(batches[:3]).equal(torch.cat(batches[3:]))
    pool.restart()
    assert all(pool.activation_generator(3).equal(batch) for batch in batches)
    with pytest.raises(ValueError, match="A batch of 11 is more than the pool's 10 samples"):
        pool.activation_generator(11)


@pytest.mark.parametrize(
    ("changes", "n_samples", "message"),
    [
        ({}, 10, "--sample-pool 10 must be at least one batch, batch_size="),
        ({"run_final_eval": True}, 9000, "run_final_eval=true evaluates .*; set run_final_eval=false"),
        ({"eval_frequency": 5}, 9000, "eval_frequency=5 evaluates .*; set eval_frequency=0"),
        ({"save_synthetic_model": True}, 9000, "save_synthetic_model=true cannot be used with --sample-pool"),
    ],
)
def test_a_pool_that_does_not_go_with_the_run_is_refused(
    tmp_path: Path, changes: dict[str, Any], n_samples: int, message: str
):
    with pytest.raises(ConfigError, match=message):
        train({**SYNTHETIC, **changes}, output=tmp_path / "out", sample_pool=n_samples)
    assert not (tmp_path / "out").exists()


def test_a_pool_is_for_synthetic_models(tinystories: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="--sample-pool is for runs on a synthetic model"):
        train(_tinystories_run(tinystories), output=tmp_path / "out", sample_pool=9000)


def test_the_same_seed_gives_the_same_run(tmp_path: Path):
    run = {**SYNTHETIC, "saes": SYNTHETIC["saes"][:1], "training_samples": 5000}
    first, second = (
        train(run, output=tmp_path / name, calibration_samples=2000, measure_samples=2000) for name in ("a", "b")
    )
    assert first.saes[0].scores == second.saes[0].scores


@pytest.mark.parametrize(("sae", "widths"), [({"architecture": "topk", "k": 3}, [32]), ({"architecture": "gated"}, [])])
def test_architectures_without_levels_train_too(sae: dict[str, Any], widths: list[int], tmp_path: Path):
    run = {**SYNTHETIC, "sae": {"d_in": 12, "d_sae": 32, **sae}}
    del run["saes"]
    result = train(run, output=tmp_path / "out", measure_samples=1000 if widths else None)
    assert [level.width for level in result.saes[0].levels] == widths  # one level, where the figures can be had
    assert result.saes[0].calibration is None


def test_sparsity_is_saved_in_the_order_of_the_saved_latents(tmp_path: Path):
    sae = {**SYNTHETIC["saes"][0], "order_latents_by": "contribution"}
    run = {**SYNTHETIC, "saes": [sae, {**sae, "name": "unordered", "order_latents_by": None}]}
    result = train(run, output=tmp_path / "out", measure_samples=1000)
    configs = build_runner_configs(run)
    assert isinstance(configs, dict)
    model = SyntheticModel.load_from_source(configs["unordered"].synthetic_model)
    for trained in result.saes:
        saved = SAE.load_from_disk(trained.path)
        fires = (saved.encode(model.sample(20_000)) > 0).float().mean(0)
        recorded = 10 ** load_file(trained.path / "sparsity.safetensors")["sparsity"]
        assert torch.corrcoef(torch.stack([fires, recorded]))[0, 1] > 0.5, (
            trained.name
        )  # an average over the training so far


def test_a_non_empty_output_folder_is_kept(tmp_path: Path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "precious").write_text("work")
    run = {**SYNTHETIC, "training_samples": 1000}
    with pytest.raises(FileExistsError, match=r"not empty; choose another with --output or replace it with --force"):
        train(run, output=output)
    assert (output / "precious").read_text() == "work"


def test_a_plot_that_cannot_be_drawn_costs_no_sae(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no font")

    monkeypatch.setattr("sae_lens_matryoshka.training.synthetic_model.plot_scores", fail)
    with pytest.raises(RuntimeError, match="no font"):
        train({**SYNTHETIC, "training_samples": 1000}, output=tmp_path / "out", calibration_samples=500)
    assert SAE.load_from_disk(next((tmp_path / "out").rglob("cfg.json")).parent)
    assert (tmp_path / "out" / "scores.csv").is_file()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("sae.d_in=32", r"sae.d_in=32, but model.layers.2 of this model is 64 wide; set sae.d_in=64"),
        ("hook_name=model.layers.9", "hook_names not found"),
        ("model_class_name=Transformer", "Unknown model class"),
        ("exclude_special_tokens=[1, 512]", r"exclude_special_tokens=\[1, 512\]: 512 is not a token of .* up to 511"),
        ("sequence_separator_token=999999", "sequence_separator_token=999999: 999999 is not a token of .* up to 511"),
        ("model_name=nobody/nothing", r"Could not load the model 'nobody/nothing' .*--set model_name=DIR"),
        ("dataset_path=nobody/nothing", r"Could not load the data set 'nobody/nothing' .*--set dataset_path=DIR"),
    ],
)
def test_what_saelens_cannot_start_is_one_sentence(tinystories: Path, tmp_path: Path, setting: str, message: str):
    with pytest.raises(ConfigError, match=message):
        train(_tinystories_run(tinystories, setting), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_how_to_resume_and_resumes(tinystories: Path, tmp_path: Path, sig: signal.Signals):
    settings = [
        f"model_name={tinystories / 'model'}",
        f"dataset_path={tinystories / 'data'}",
        "hook_name=model.layers.2",
        "streaming=false",
        "sae.d_in=64",
        "sae.d_sae=256",
        "sae.matryoshka_widths=[32, 256]",
        "sae.k=8",
        "device=cpu",
        "training_tokens=4_000_000",
        "lr_warm_up_steps=0",  # so that the run may end earlier
        "lr_decay_steps=0",
        f"checkpoint_path={tmp_path / 'checkpoints'}",
        "n_checkpoints=40",  # the first one shows that it trains
    ]
    command = ["train", "tinystories", "--output", str(tmp_path / "out")]
    for setting in settings:
        command += ["--set", setting]
    process, stderr = processes.start(command, tmp_path, tmp_path), tmp_path / "stderr"
    while process.is_alive() and not list((tmp_path / "checkpoints").glob("*/[0-9]*")):
        time.sleep(0.05)
    assert process.pid is not None
    os.kill(process.pid, sig)
    process.join(timeout=60)
    assert process.exitcode == 130
    assert "Interrupted; continue with --resume auto" in stderr.read_text()
    assert "Traceback" not in stderr.read_text()
    assert not (tmp_path / "out").exists()

    run = read_run_file("tinystories", settings)
    n_done = max(int(checkpoint.name) for checkpoint in (tmp_path / "checkpoints").glob("*/[0-9]*"))
    assert 0 < n_done < 4_000_000
    run |= {"training_tokens": n_done + 10 * 2048, "n_checkpoints": 0}
    result = train(run, output=tmp_path / "out", resume="auto", calibration_samples=10_000, measure_samples=10_000)
    assert result.saes[0].levels[-1].fvu < 0.7
