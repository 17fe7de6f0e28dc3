"""Training on from an SAE that is there: the run file's SAE, with the weights of the folder, for every variant."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, TrainingSAE
from safetensors.torch import load_file, save_file

from sae_lens_matryoshka import MatryoshkaTopKTrainingSAE, MatryoshkaTopKTrainingSAEConfig
from sae_lens_matryoshka.errors import ConfigError
from sae_lens_matryoshka.run_files.building import build_runner_configs
from sae_lens_matryoshka.saes.matryoshka_sae import MatryoshkaSAE
from sae_lens_matryoshka.training.run import train
from sae_lens_matryoshka.training.training_on import load_starting_point
from tests.tiny_runs import assert_same_saes, interrupt_at_step, tiny_multi_run, tiny_run, tiny_sae

SHORT: Any = {"training_tokens": 40 * 128, "lr_warm_up_steps": 0, "lr_decay_steps": 0, "n_checkpoints": 1}
SELECTING = {"k": 8, "use_matryoshka_aux_loss": True}
FIELDS: dict[str, dict[str, Any]] = {
    "matryoshka": {**SELECTING, "normalize_activations": "expected_average_only_in"},
    "matryoshka_topk": SELECTING,
    "matryoshka_jumprelu": {"l0_coefficient": 0.1, "normalize_activations": "layer_norm"},
    "matryoshka_standard": {"l1_coefficient": 0.1, "normalize_activations": "covariance_whitening"},
}
WITHOUT_LEVELS = {"batchtopk": {"k": 8}, "gated": {"l1_coefficient": 0.1}}
ALL = {**FIELDS, **WITHOUT_LEVELS}


def _sae(architecture: str, **changes: Any) -> dict[str, Any]:
    shape = {field: tiny_sae()[field] for field in ("d_in", "d_sae", "matryoshka_widths")}
    if architecture in WITHOUT_LEVELS:
        del shape["matryoshka_widths"]
    fields = {"architecture": architecture, **shape, **ALL[architecture], **changes}
    return {field: value for field, value in fields.items() if value is not None}


def _train(run: dict[str, Any], output: Path, resume: str | None = None) -> Path:
    """Train with few samples to calibrate and measure on, where the architecture has them, and return the output."""
    architecture = run["sae"]["architecture"]
    samples: Any = {"calibration_samples": 300 if architecture in ("matryoshka", "batchtopk") else None}
    samples["measure_samples"] = None if architecture == "gated" else 300
    return train(run, output=output, resume=resume, **samples).output


@pytest.fixture(scope="module")
def trained(tinystories: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """For every architecture a saved SAE and a checkpoint of the same run; change copies only."""
    folder = tmp_path_factory.mktemp("trained")
    paths: dict[str, dict[str, Path]] = {}
    for architecture in ALL:
        run = tiny_run(tinystories, folder / f"{architecture}_checkpoints", sae=_sae(architecture), **SHORT)
        saved = _train(run, folder / architecture)
        [checkpoint] = (folder / f"{architecture}_checkpoints").glob("*/[0-9]*")
        paths[architecture] = {"saved": saved, "checkpoint": checkpoint}
    return paths


def _run(tinystories: Path, path: Path, sae: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return tiny_run(tinystories, None, **{**SHORT, "sae": sae, "from_pretrained_path": str(path), **changes})


def _load(path: Path, sae: dict[str, Any]) -> Any:
    cfg = build_runner_configs({"model_name": "x", "dataset_path": "x", "n_batches_in_buffer": 64, "sae": sae})
    assert not isinstance(cfg, dict)
    return load_starting_point(str(path), cfg.sae).sae  # type: ignore[union-attr]


def _unwhitened(architecture: str, source: str) -> dict[str, Any]:
    """The normalization to train a saved SAE on with: SAELens has folded a whitening into its weights."""
    whitened = FIELDS.get(architecture, {}).get("normalize_activations") == "covariance_whitening"
    return {"normalize_activations": "none"} if whitened and source == "saved" else {}


@pytest.mark.parametrize("source", ["saved", "checkpoint"])
@pytest.mark.parametrize("architecture", ALL)
def test_without_learning_the_sae_that_comes_out_is_the_one_that_went_in(
    trained: Any, tinystories: Path, tmp_path: Path, architecture: str, source: str
):
    path = trained[architecture][source]
    sae = _sae(architecture, **_unwhitened(architecture, source))
    run = _run(tinystories, path, sae, lr=1e-10, training_tokens=4 * 128)
    output = _train(run, tmp_path / "out")

    expected = path
    if source == "checkpoint":  # what SAELens would save of it
        training_sae: TrainingSAE[Any] = TrainingSAE.load_from_disk(path)
        scaler = json.loads((path / "activation_scaler.json").read_text())
        if scaler["scaling_factor"] is not None:
            training_sae.fold_activation_norm_scaling_factor(scaler["scaling_factor"])
        if scaler["has_whitening"]:
            whitening = load_file(path / "activation_whitening.safetensors")
            training_sae.fold_activation_whitening(whitening["mean"], whitening["matrix"], whitening["inverse_matrix"])
        expected = tmp_path / "expected"
        training_sae.save_inference_model(expected)
    ours, theirs = (load_file(folder / "sae_weights.safetensors") for folder in (output, expected))
    assert ours.keys() == theirs.keys()
    calibrated = {"threshold"} if architecture in ("matryoshka", "batchtopk") else set()
    for name in ours.keys() - calibrated:
        assert torch.allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-5), name
    saved = SAE.load_from_disk(output)
    assert saved.cfg.metadata.training_architecture == architecture
    assert (saved.cfg.metadata.training_architecture_details or {}).get("matryoshka_widths") == sae.get(
        "matryoshka_widths"
    )
    assert json.loads((output / "runner_cfg.json").read_text())["from_pretrained_path"] == str(path)


@pytest.mark.parametrize("architecture", FIELDS)
def test_what_the_run_file_says_is_what_is_trained(trained: Any, tinystories: Path, tmp_path: Path, architecture: str):
    changes: dict[str, Any] = {"level_weights": [3.0, 2.0, 1.0], **_unwhitened(architecture, "saved")}
    if "k" in FIELDS[architecture]:
        changes["k"] = 3
    run = _run(tinystories, trained[architecture]["saved"], _sae(architecture, **changes))
    output = _train(run, tmp_path / "out")
    details = SAE.load_from_disk(output).cfg.metadata.training_architecture_details
    assert details is not None
    assert details["level_weights"] == [3.0, 2.0, 1.0]
    if architecture == "matryoshka":
        assert details["k"] == 3
        assert float((output / "levels.csv").read_text().splitlines()[-1].split(",")[2]) == pytest.approx(3, rel=0.2)
    before = MatryoshkaSAE.load_from_disk(trained[architecture]["saved"])
    change = (MatryoshkaSAE.load_from_disk(output).W_dec - before.W_dec).norm() / before.W_dec.norm()
    assert 0.01 < change < 1.5


@pytest.mark.parametrize(
    ("made_as", "source", "architecture"),
    [
        ("matryoshka", "saved", "matryoshka_jumprelu"),
        ("matryoshka", "checkpoint", "matryoshka_jumprelu"),
        ("matryoshka_jumprelu", "saved", "matryoshka"),
        ("matryoshka_jumprelu", "checkpoint", "matryoshka_topk"),
        ("matryoshka_topk", "checkpoint", "matryoshka"),
        ("matryoshka_standard", "saved", "matryoshka_topk"),
        ("batchtopk", "saved", "matryoshka"),
        ("matryoshka", "checkpoint", "batchtopk"),
    ],
)
def test_weights_of_another_architecture(trained: Any, made_as: str, source: str, architecture: str):
    path = trained[made_as][source]
    reference: SAE[Any] = SAE.load_from_disk(path) if source == "saved" else TrainingSAE.load_from_disk(path)
    normalization = {"normalize_activations": reference.cfg.normalize_activations}
    sae = _load(path, _sae(architecture, **normalization))
    assert sae.cfg.architecture() == architecture
    x = 3 * torch.randn(50, 64)
    expected: Any = MatryoshkaSAE.from_sae(reference, [128] if made_as == "batchtopk" else None)
    hidden_pre, expected_hidden_pre = (s.process_sae_in(x) @ s.W_enc + s.b_enc for s in (sae, expected))
    assert torch.allclose(hidden_pre, expected_hidden_pre, atol=1e-4)
    if architecture == "matryoshka_jumprelu":  # the very function of the saved SAE
        assert torch.allclose(sae(x), expected(x), atol=1e-4)
        assert torch.equal(sae.encode(x) > 0, expected.encode(x) > 0)
    if architecture in ("matryoshka", "batchtopk") and hasattr(expected, "threshold"):
        norms = expected.W_dec.norm(dim=-1)
        assert sae.topk_threshold.item() == pytest.approx((expected.threshold * norms).mean().item())


def test_what_the_levels_were_saved_as_is_an_sae_too(trained: Any, tmp_path: Path):
    saved: Any = MatryoshkaSAE.load_from_disk(trained["matryoshka_jumprelu"]["saved"])
    saved.save_model(tmp_path)
    sae = _load(tmp_path, _sae("matryoshka_jumprelu"))
    assert torch.equal(sae.threshold, saved.threshold)
    assert torch.equal(sae.W_dec, saved.W_dec)


def test_one_of_the_saes_of_a_checkpoint(tinystories: Path, tmp_path: Path):
    train(
        tiny_multi_run(tinystories, tmp_path / "checkpoints", **{**SHORT, "training_tokens": 6 * 128}),
        output=tmp_path / "several",
        calibration_samples=300,
        measure_samples=300,
    )
    [checkpoint] = (tmp_path / "checkpoints").glob("*/[0-9]*")
    run = _run(tinystories, checkpoint / "late", _sae("matryoshka"), lr=1e-10, training_tokens=256)
    output = _train(run, tmp_path / "out")
    late: Any = TrainingSAE.load_from_disk(checkpoint / "late")
    scaling_factor = json.loads((checkpoint / "late" / "activation_scaler.json").read_text())["scaling_factor"]
    late.fold_activation_norm_scaling_factor(scaling_factor)
    assert torch.allclose(SAE.load_from_disk(output).b_dec, late.b_dec, rtol=1e-4, atol=1e-6)


def test_a_run_that_trains_on_is_resumed_like_any_other(
    trained: Any, tinystories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = tmp_path / "source"
    shutil.copytree(trained["matryoshka"]["saved"], source)
    run = _run(tinystories, source, _sae("matryoshka"))
    expected = _train(run, tmp_path / "uninterrupted")
    run["checkpoint_path"] = str(tmp_path / "checkpoints")
    with monkeypatch.context() as patch:
        interrupt_at_step(patch, 13)
        with pytest.raises(KeyboardInterrupt):
            _train(run, tmp_path / "out")
    shutil.rmtree(source)  # a checkpoint holds everything
    assert_same_saes(expected, _train(run, tmp_path / "out", resume="auto"))


@pytest.mark.parametrize(
    ("architecture", "source", "changes", "message"),
    [
        ("matryoshka", "saved", {"d_sae": 256}, "sae.d_sae=256, but these weights have 128; set sae.d_sae=128"),
        ("matryoshka", "checkpoint", {"d_in": 32}, "sae.d_in=32, but these weights have 64; set sae.d_in=64"),
        (
            "matryoshka_topk",
            "saved",
            {"matryoshka_widths": [32, 128]},
            r"sae.matryoshka_widths=\[32, 128\], but these weights have \[16, 48, 128\]; set",
        ),
        ("matryoshka_jumprelu", "checkpoint", {"matryoshka_widths": [32, 128]}, "sae.matryoshka_widths="),
        ("matryoshka", "saved", {"apply_b_dec_to_input": False}, "sae.apply_b_dec_to_input=False, but these weights"),
        ("matryoshka", "saved", {"normalize_activations": "layer_norm"}, "sae.normalize_activations='layer_norm', but"),
        ("matryoshka", "checkpoint", {"normalize_activations": "none"}, "set sae.normalize_activations=expected_aver"),
        ("matryoshka_jumprelu", "saved", {"normalize_activations": None}, "set sae.normalize_activations=layer_norm"),
        ("matryoshka_standard", "saved", {}, "for activations as 'none' gives them; set sae.normalize_act"),
    ],
)  # fmt: skip
def test_what_contradicts_the_weights_is_refused_by_name(
    trained: Any,
    tinystories: Path,
    tmp_path: Path,
    architecture: str,
    source: str,
    changes: dict[str, Any],
    message: str,
):
    path = trained[architecture][source]
    run = _run(tinystories, path, _sae(architecture, **changes), model_name="nobody/nothing")
    with pytest.raises(ConfigError, match=f"from_pretrained_path='{path}': .*{message}"):
        train(run, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("made_as", "architecture"),
    [("matryoshka_topk", "matryoshka_jumprelu"), ("matryoshka", "matryoshka_standard"), ("gated", "matryoshka")],
)
@pytest.mark.parametrize("source", ["saved", "checkpoint"])
def test_architectures_that_cannot_take_the_weights(trained: Any, made_as: str, architecture: str, source: str):
    with pytest.raises(ConfigError, match=f"sae.architecture='{architecture}' cannot train the weights of a .* on; "):
        _load(trained[made_as][source], _sae(architecture))


@pytest.mark.parametrize("source", ["saved", "checkpoint"])
def test_selecting_by_decoder_norm_where_it_was_not(source: str, tmp_path: Path):
    cfg = MatryoshkaTopKTrainingSAEConfig(64, 128, k=8, matryoshka_widths=[16, 48, 128])
    cfg.rescale_acts_by_decoder_norm = False
    sae = MatryoshkaTopKTrainingSAE(cfg)
    (sae.save_model if source == "checkpoint" else sae.save_inference_model)(tmp_path)
    with pytest.raises(ConfigError, match=r"sae.rescale_acts_by_decoder_norm=True, but these weights have False"):
        _load(tmp_path, _sae("matryoshka_topk"))


@pytest.mark.parametrize("ordered", [True, False])
def test_an_order_of_latents_goes_on_or_is_made_final(ordered: bool, tmp_path: Path):
    cfg = MatryoshkaTopKTrainingSAEConfig(
        64, 128, k=8, matryoshka_widths=[16, 48, 128], order_latents_by="contribution"
    )
    source = MatryoshkaTopKTrainingSAE(cfg)
    source.latent_order_statistic = torch.rand(128)
    source.b_enc.data.normal_()
    source.save_model(tmp_path)
    sae = _load(tmp_path, _sae("matryoshka_topk", order_latents_by="contribution" if ordered else None))
    if ordered:
        assert torch.equal(sae.latent_order_statistic, source.latent_order_statistic)
        assert torch.equal(sae.W_enc, source.W_enc)
    else:
        order = source.latent_order_statistic.argsort(descending=True)
        norms = source.W_dec.norm(dim=-1)
        assert torch.allclose(sae.W_enc, (source.W_enc * norms)[:, order], atol=1e-6)
        assert torch.allclose(sae.b_enc, (source.b_enc * norms)[order], atol=1e-6)


def test_what_is_no_sae_is_not_blamed_on_the_model(trained: Any, tinystories: Path, tmp_path: Path):
    (tmp_path / "several" / "early").mkdir(parents=True)
    (tmp_path / "several" / "early" / "cfg.json").write_text("{}")
    damaged = tmp_path / "damaged"
    shutil.copytree(trained["matryoshka"]["checkpoint"], damaged)
    weights = damaged / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    infinite = tmp_path / "infinite"
    shutil.copytree(trained["matryoshka_jumprelu"]["saved"], infinite)
    tensors = load_file(infinite / "sae_weights.safetensors")
    tensors["threshold"][3] = torch.inf
    save_file(tensors, infinite / "sae_weights.safetensors")
    without_scaler = tmp_path / "without_scaler"
    shutil.copytree(trained["matryoshka"]["checkpoint"], without_scaler)
    for name in ("activation_scaler.json", "checkpoint.json"):
        (without_scaler / name).unlink()
    for path, architecture, message in (
        (tmp_path / "nowhere", "matryoshka", "there is no such folder; give that of a saved SAE or of a checkpoint"),
        (tmp_path, "matryoshka", "this is not an SAE: it has no cfg.json"),
        (tmp_path / "several", "matryoshka", "this is not an SAE: it has no cfg.json, but early in it has"),
        (damaged, "matryoshka", r"the checkpoint .* is damaged: sae_weights.safetensors has \d+ bytes"),
        (infinite, "matryoshka_jumprelu", "1 latents can never fire: their threshold is infinite"),
        (without_scaler, "matryoshka", "activation_scaler.json is missing"),
    ):
        run = _run(tinystories, path, _sae(architecture), model_name="nobody/nothing")
        with pytest.raises(ConfigError, match=f"from_pretrained_path='{path}': {message}"):
            train(run, output=tmp_path / "out")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sae": _sae("matryoshka", decoder_init_norm=0.2)}, "sae.decoder_init_norm says how weights start"),
        ({"saes": {"a": _sae("matryoshka")}, "hook_names": "h"}, "from_pretrained_path is for a single SAE"),
        ({"sae": _sae("matryoshka"), "synthetic_model": {}}, "from_pretrained_path is for a single SAE"),
    ],
)
def test_what_does_not_go_with_training_on(fields: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=f"{message}.* --unset .* takes it out"):
        build_runner_configs({"model_name": "x", "dataset_path": "x", "from_pretrained_path": "x", **fields})
