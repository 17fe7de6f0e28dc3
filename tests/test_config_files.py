"""Run files: the embedded ones build, and every mistake in one is named before anything is loaded."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from sae_lens import LanguageModelSAERunnerConfig, MultiSAETrainingRunnerConfig
from sae_lens.synthetic import SyntheticSAERunnerConfig

from sae_lens_matryoshka import MatryoshkaTrainingSAEConfig, paper_widths
from sae_lens_matryoshka.errors import ConfigError
from sae_lens_matryoshka.registration import TRAINING_CLASSES
from sae_lens_matryoshka.run_files.building import build_runner_configs
from sae_lens_matryoshka.run_files.reading import embedded_run_files, read_run_file
from sae_lens_matryoshka.run_files.saes import named_saes

RUN: dict[str, Any] = {
    "model_name": "some/model",
    "dataset_path": "some/data",
    "sae": {"architecture": "matryoshka", "d_in": 8, "d_sae": 64, "k": 4, "matryoshka_widths": [8, 64]},
    "context_size": 128,
    "n_batches_in_buffer": 64,
    "verbose": False,
}
SYNTHETIC: dict[str, Any] = {
    "synthetic_model": {"num_features": 20, "hidden_dim": 8, "hierarchy": {"total_root_nodes": 2}},
    "sae": RUN["sae"],
}


@pytest.mark.parametrize("name", embedded_run_files())
def test_embedded_run_files_build(name: str):
    configs = build_runner_configs(read_run_file(name, [] if name == "synthetic" else ["device=cpu"]))
    expected: dict[str, type] = {
        "synthetic": dict,
        "synthsaebench-mini": dict,
        "tinystories": LanguageModelSAERunnerConfig,
        "gemma-2-2b": LanguageModelSAERunnerConfig,
        "gemma-2-2b-sweep": MultiSAETrainingRunnerConfig,
        "tinystories-topk": LanguageModelSAERunnerConfig,
        "tinystories-nabeshima": LanguageModelSAERunnerConfig,
        "gemma-scope-2-like": LanguageModelSAERunnerConfig,
        "gemma-3-270m": LanguageModelSAERunnerConfig,
        "smollm2-135m": LanguageModelSAERunnerConfig,
    }
    assert isinstance(configs, expected[name])


def test_every_variant_has_a_run_file():
    runs = [read_run_file(name) for name in embedded_run_files()]
    architectures = {sae["architecture"] for run in runs for sae in named_saes(run).values()}
    assert {config_class.architecture() for _, config_class in TRAINING_CLASSES} <= architectures


def test_gemma_run_file_has_the_papers_settings():
    cfg = build_runner_configs(read_run_file("gemma-2-2b", ["device=cpu"]))
    assert isinstance(cfg, LanguageModelSAERunnerConfig)
    assert cfg.sae.matryoshka_widths == paper_widths(65536)
    assert (cfg.sae.d_sae, cfg.sae.k, cfg.lr) == (65536, 40, 3e-4)
    assert (cfg.training_tokens, cfg.train_batch_size_tokens) == (500_000_000, 2048)
    assert (cfg.model_name, cfg.hook_name) == ("gemma-2-2b", "blocks.12.hook_resid_post")
    sweep = build_runner_configs(read_run_file("gemma-2-2b-sweep", ["device=cpu"]))
    assert isinstance(sweep, MultiSAETrainingRunnerConfig)
    assert {name: sae.k for name, sae in sweep.saes.items()} == {  # type: ignore[attr-defined]
        f"matryoshka_k{k}": k for k in (20, 40, 80, 160, 320)
    }


def test_synthetic_run_file_names_its_saes():
    configs = build_runner_configs(read_run_file("synthetic"))
    assert isinstance(configs, dict)
    assert {name: cfg.sae.architecture() for name, cfg in configs.items()} == {
        "matryoshka": "matryoshka",
        "batchtopk": "batchtopk",
    }
    assert all(isinstance(cfg, SyntheticSAERunnerConfig) for cfg in configs.values())


def test_settings_change_fields_at_any_depth(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**RUN, "saes": [{"k": 1}, {"k": 2}]}))
    run = read_run_file(path, ["lr=3e-4", "sae.k=7", "saes.1.k=9", "logger.run_name=a b", "sae.level_weights=[1, 2]"])
    assert run["lr"] == 3e-4
    assert run["sae"]["k"] == 7
    assert run["saes"] == [{"k": 1}, {"k": 9}]
    assert run["logger"] == {"run_name": "a b"}
    assert run["sae"]["level_weights"] == [1, 2]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("lr", "not of the form key.sub=value"),
        ("=3", "not of the form key.sub=value"),
        ("lr=[", "not valid YAML"),
        ("model_name.x=3", "reaches into model_name, a plain value"),
        ("saes.2.k=3", r"needs an index from 0 to 0 or a name \(matryoshka_k1\) in place of '2'"),
    ],
)
def test_unusable_settings(setting: str, message: str, tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**RUN, "saes": [{"k": 1}]}))
    with pytest.raises(ConfigError, match=message):
        read_run_file(path, [setting])


def test_unusable_files(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"no run file 'nowhere.yaml'.*gemma-2-2b, .*synthetic, .*tinystories"):
        read_run_file("nowhere.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="must hold a mapping"):
        read_run_file(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        read_run_file(tmp_path / "broken.yaml")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"trainig_tokens": 5}, r"trainig_tokens is not a field of .*; did you mean 'training_tokens'\?"),
        (
            {"sae": {**RUN["sae"], "matryoshka_width": [8]}},
            r"sae.matryoshka_width .* did you mean 'matryoshka_widths'\?",
        ),
        ({"logger": {"log_to_wanb": True}}, r"logger.log_to_wanb .* did you mean 'log_to_wandb'\?"),
        ({"lr": "fast"}, r"lr='fast' must be float"),
        ({"streaming": 3}, r"streaming=3 must be bool"),
        ({"training_tokens": 1.5}, r"training_tokens=1.5 must be int"),
        ({"model_kwargs": [1]}, r"model_kwargs=\[1\] must be dict"),
        ({"sae": {**RUN["sae"], "architecture": "matrioshka"}}, r"sae.architecture='matrioshka'.*mean 'matryoshka'\?"),
        ({"sae": {**RUN["sae"], "matryoshka_widths": [8, 8, 64]}}, r"sae: matryoshka_widths=.*8 is repeated"),
        ({"sae": {**RUN["sae"], "matryoshka_widths": "8,64"}}, r"sae.matryoshka_widths='8,64' must be list\[int\]"),
        (
            {"sae": {"architecture": "matryoshka", "d_in": 8, "k": 4}},
            "sae.d_sae is missing, which every matryoshka",
        ),
        ({"sae": 3}, "sae=3 must be a mapping"),
        ({"sae": {**RUN["sae"], "device": "cpu"}}, "sae.device is not used; set device, which is the SAE's too"),
        ({"sae": {**RUN["sae"], "metadata": {}}}, "sae.metadata is not used; set nothing: the run writes it"),
        ({"exclude_special_tokens": [3, -1]}, r"exclude_special_tokens=\[3, -1\]: -1 is no token id"),
        ({"exclude_special_tokens": [10**12]}, "1000000000000 is no token id"),
        ({"sequence_separator_token": -1}, "sequence_separator_token=-1: -1 is no token id"),
        (
            {"logger": {"wandb_id": "../../elsewhere"}},
            r"logger.wandb_id='../../elsewhere' cannot be used, since it holds '/'",
        ),
        ({"hook_eval": "h"}, "hook_eval='h' is not used by SAELens. --unset hook_eval takes it out"),
        ({"logger": {"log_optimizer_state_to_wandb": True}}, "logger.log_optimizer_state_to_wandb=True is not used"),
        ({"lr_end": 1e-5}, "lr_end=1e-05 is only used with lr_scheduler_name=cosineannealing or"),
        ({"cached_activations_path": "x"}, "cached_activations_path='x' is only used with use_cached_activations=true"),
        (
            {"sae": {"architecture": "jumprelu", "d_in": 8, "d_sae": 64, "target_l0": 5}},
            "sae.target_l0=5 is only used with sae.jumprelu_sparsity_loss_mode=quadratic",
        ),
        ({"device": "cuda:7"}, r"device='cuda:7' cannot be used on this machine \(.*\); set device=cpu"),
        ({"llm_device": "gpu"}, "llm_device='gpu' cannot be used on this machine"),
        ({"training_tokens": 0}, "training_tokens=0 must be at least 1"),
        ({"training_tokens": -5}, "training_tokens=-5 must be at least 1"),
        ({"training_tokens": 100}, "training_tokens=100 is less than one step of train_batch_size_tokens=4096"),
        ({"lr": -1}, "lr=-1 must be above 0, such as 3e-4"),
        ({"lr": float("nan")}, "lr=nan must be above 0"),
        ({"adam_beta1": 2}, "adam_beta1=2 must be from 0 to below 1"),
        ({"train_batch_size_tokens": 0}, "train_batch_size_tokens=0 must be at least 1"),
        ({"context_size": 0}, "context_size=0 must be at least 1"),
        ({"store_batch_size_prompts": 0}, "store_batch_size_prompts=0 must be at least 1"),
        ({"dead_feature_window": 0}, "dead_feature_window=0 must be at least 1"),
        ({"lr_warm_up_steps": -1}, "lr_warm_up_steps=-1 must be at least 0"),
        (
            {"training_tokens": 8192, "lr_warm_up_steps": 1, "lr_decay_steps": 2},
            "lr_warm_up_steps=1 and lr_decay_steps=2 take more than the 2 steps of this run",
        ),
        ({"sae": {**RUN["sae"], "decoder_init_norm": -1}}, "sae.decoder_init_norm=-1 must be above 0"),
        ({"sae": {**RUN["sae"], "aux_loss_coefficient": -0.5}}, "sae.aux_loss_coefficient=-0.5 must be at least 0"),
        ({"lr": True}, "lr=True must be float"),
        ({"seed": True}, "seed=True must be int"),
        ({"seed": 2**64}, "seed=18446744073709551616 is too large"),
        ({"context_size": 10**30}, "context_size=1000000000000000000000000000000 is too large"),
        ({"lr_scheduler_name": "cosine"}, "lr_scheduler_name='cosine' must be one of constant, cosineannealing"),
        ({"dtype": "abc"}, "dtype='abc' must be one of float32"),
        ({"checkpoint_path": ""}, "checkpoint_path='' is the root of all folders"),
        ({"activations_mixing_fraction": 2.0}, "activations_mixing_fraction=2.0 must be from 0 to 1"),
        ({"n_eval_batches": 0}, "n_eval_batches=0 must be at least 1"),
        ({"logger": {"wandb_log_frequency": 0}}, "logger.wandb_log_frequency=0 must be at least 1"),
        ({"use_cached_activations": True, "cached_activations_path": "./no"}, "cached_activations_path='./no' looks"),
        ({"sae": {**RUN["sae"], "d_in": -1}}, "sae.d_in=-1 must be at least 1"),
        ({"sae": {**RUN["sae"], "k": 1e-6}}, "sae.k=1e-06 of train_batch_size_tokens=4096 samples is less than one"),
        ({"sae": {**RUN["sae"], "topk_threshold_lr": float("nan")}}, "sae.topk_threshold_lr=nan must be from 0 to 1"),
        (
            {"sae": {"architecture": "jumprelu", "d_in": 8, "d_sae": 64, "jumprelu_init_threshold": 0}},
            "sae.jumprelu_init_threshold=0 must be above 0",
        ),
        (
            {"sae": {"architecture": "standard", "d_in": 8, "d_sae": 64, "l1_warm_up_steps": 1000}},
            "sae.l1_warm_up_steps=1000 take more than the 488 steps of this run",
        ),
        ({"saes": {"a": {"decoder_init_norm": 0}}}, "saes.a.decoder_init_norm=0 must be above 0"),
        (
            {"dataset_trust_remote_code": True},
            "dataset_trust_remote_code=True runs code .* say so yourself with --trust-remote-code",
        ),
        (
            {"model_from_pretrained_kwargs": {"trust_remote_code": True}},
            "model_from_pretrained_kwargs.trust_remote_code=True runs code",
        ),
        ({"model_name": "./nowhere"}, "model_name='./nowhere' looks like a local path, but nothing is there"),
        ({"dataset_path": "/nowhere"}, "dataset_path='/nowhere' looks like a local path"),
        ({"dataset_path": ""}, "dataset_path is missing"),
        (
            {"n_batches_in_buffer": 1},
            r"train_batch_size_tokens=4096 is above .* = 128 tokens; raise n_batches_in_buffer",
        ),
        ({"saes": []}, r"saes=\[\] must be a list or mapping"),
        ({"saes": [RUN["sae"], RUN["sae"]], "hook_names": "h"}, "Two entries of saes are called 'matryoshka_k4'"),
    ],
)
def test_mistakes_in_a_language_model_run(changed: dict[str, Any], message: str):
    if "device" in changed:
        pytest.importorskip("torch")
        import torch

        if torch.cuda.is_available():
            pytest.skip("this machine has a CUDA device")
    with pytest.raises(ConfigError, match=message):
        build_runner_configs({**RUN, **changed})


def test_code_of_others_runs_where_the_user_says_so():
    config = build_runner_configs({**RUN, "dataset_trust_remote_code": True}, trust_remote_code=True)
    assert config.dataset_trust_remote_code is True  # type: ignore[union-attr]
    for run in (RUN, {**RUN, "dataset_trust_remote_code": False}):
        assert build_runner_configs(run).dataset_trust_remote_code is False  # type: ignore[union-attr]


def test_fields_that_are_used_with_another_one_are_taken_then():
    build_runner_configs({**RUN, "lr_scheduler_name": "CosineAnnealing", "lr_end": 1e-5})
    build_runner_configs({**RUN, "hook_eval": "NOT_IN_USE", "n_restart_cycles": 1, "lr_end": None})  # their defaults


def test_a_run_without_an_sae():
    with pytest.raises(ConfigError, match="The field 'sae' is missing"):
        build_runner_configs({"model_name": "x"})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_feature": 3}, r"synthetic_model.num_feature .* did you mean 'num_features'\?"),
        ({"hierarchy": {"total_roots": 2}}, r"synthetic_model.hierarchy.total_roots .* 'total_root_nodes'\?"),
        ({"hierarchy": {"branching_factor": 1}}, "synthetic_model: branching_factor must be at least 2"),
        ({"firing_probability": {"generator_name": "zipf"}}, "synthetic_model: .*zipf"),
        (
            {"firing_probability": {"probability": 2}},
            "firing_probability.probability=2 must be above 0",
        ),
        ({"mean_firing_magnitudes": -1}, "synthetic_model.mean_firing_magnitudes=-1 must be above 0"),
        ({"std_firing_magnitudes": float("nan")}, "synthetic_model.std_firing_magnitudes=nan must be at least 0"),
        ({"orthogonalization": {"num_steps": -1}}, "synthetic_model.orthogonalization.num_steps=-1 must be at least 0"),
        ({"hierarchy": {"total_root_nodes": 1000}}, "total_root_nodes=1000 are more than num_features=20"),
        ({"dtype": "abc"}, "synthetic_model.dtype='abc' must be one of"),
    ],
)
def test_mistakes_in_a_synthetic_run(changed: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        build_runner_configs({**SYNTHETIC, "synthetic_model": {**SYNTHETIC["synthetic_model"], **changed}})


def test_values_take_the_types_that_saelens_wants():
    cfg = build_runner_configs({**RUN, "training_tokens": 5e6, "seqpos_slice": [1, -1], "device": "auto", "lr": 1})
    assert isinstance(cfg, LanguageModelSAERunnerConfig)
    assert type(cfg.training_tokens) is int
    assert cfg.seqpos_slice == (1, -1)
    assert cfg.device in ("cpu", "cuda")
    assert isinstance(cfg.sae, MatryoshkaTrainingSAEConfig)


def test_building_leaves_the_run_alone():
    run = {**RUN, "seqpos_slice": [1, -1]}
    build_runner_configs(run)
    assert run == {**RUN, "seqpos_slice": [1, -1]}


def test_saes_by_list_or_mapping_and_any_architecture():
    entries = [{**RUN["sae"], "name": "small"}, {"architecture": "batchtopk", "d_in": 8, "d_sae": 64, "k": 2.5}]
    shared = {k: v for k, v in RUN.items() if k not in ("sae", "verbose")}
    by_list = build_runner_configs({**shared, "saes": entries, "hook_names": "h"})
    assert isinstance(by_list, MultiSAETrainingRunnerConfig)
    assert list(by_list.saes) == ["small", "batchtopk_k2.5"]
    by_name = build_runner_configs({**shared, "saes": {"a": RUN["sae"]}, "hook_names": {"a": "h"}})
    assert isinstance(by_name, MultiSAETrainingRunnerConfig)
    assert list(by_name.saes) == ["a"]


def test_paths_in_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    run = {**RUN, "model_name": "~/model", "output_path": "~/out", "checkpoint_path": "~/checkpoints"}
    cfg = build_runner_configs(run)
    assert isinstance(cfg, LanguageModelSAERunnerConfig)
    assert (cfg.model_name, cfg.output_path) == (str(tmp_path / "model"), str(tmp_path / "out"))
    assert Path(cfg.checkpoint_path or "").parent == tmp_path / "checkpoints"
    with pytest.raises(ConfigError, match=r"model_name='.*/nowhere' looks like a local path, but nothing is there"):
        build_runner_configs({**run, "model_name": "~/nowhere"})


@pytest.mark.parametrize(
    ("text", "value"),
    [("10", 10), ("1_000", 1000), ("0x1f", 31), ("-3", -3), ("3e-4", 3e-4), ("1.5", 1.5), (".5", 0.5), ("1.", 1.0),
     (".inf", float("inf")), ("010", "010"), ("1:30:00", "1:30:00"), ("true", True), ("null", None)],
)  # fmt: skip
def test_numbers_are_those_of_yaml_1_2(text: str, value: object):
    assert read_run_file("synthetic", [f"seed={text}"])["seed"] == value
