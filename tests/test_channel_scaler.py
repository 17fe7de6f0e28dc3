"""``channel_standardization``: SAELens's whitening with a diagonal matrix, wherever an SAE is trained, or refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, ActivationsStore, LanguageModelSAETrainingRunner, TrainingSAE
from sae_lens.training.activation_scaler import ActivationScaler, ActivationWhitening
from safetensors.torch import load_file
from torch.testing import assert_close

from sae_lens_matryoshka import MatryoshkaSAE
from sae_lens_matryoshka.errors import ConfigError, UserError
from sae_lens_matryoshka.measuring.channel_statistics import channel_statistics_reference
from sae_lens_matryoshka.registration import TRAINING_CLASSES
from sae_lens_matryoshka.run_files.building import build_runner_configs
from sae_lens_matryoshka.run_files.checking import check_run_file
from sae_lens_matryoshka.run_files.reading import read_run_file
from sae_lens_matryoshka.training import language_model
from sae_lens_matryoshka.training.channel_scaler import ChannelScaler
from sae_lens_matryoshka.training.resuming.manifest import MANIFEST_FILENAME
from sae_lens_matryoshka.training.run import train
from tests.saes.step_inputs import train_step_input
from tests.tiny_runs import assert_same_saes, interrupt_at_step, tiny_multi_run, tiny_run, tiny_sae

WORDS = ["covariance_whitening", "channel_standardization"]
SAMPLES: Any = {"calibration_samples": 300, "measure_samples": 300}
SHORT: Any = {"training_tokens": 20 * 128, "lr_warm_up_steps": 0, "lr_decay_steps": 0}


def _whitening(d_in: int, word: str = "channel_standardization", seed: int = 0) -> ActivationWhitening:
    """A whitening as of a real model: one channel has a mean of 5,000."""
    generator = torch.Generator().manual_seed(seed)
    mean = 50 * torch.randn(d_in, generator=generator, dtype=torch.float64)
    mean[3] = 5000
    deviation = 10 + 90 * torch.rand(d_in, generator=generator, dtype=torch.float64)
    deviation[3] = 600
    rotation = torch.eye(d_in, dtype=torch.float64)
    if word == "covariance_whitening":
        rotation = torch.linalg.qr(torch.randn(d_in, d_in, generator=generator, dtype=torch.float64)).Q
    return ActivationWhitening(mean, rotation / deviation, deviation.unsqueeze(1) * rotation.T)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_channel_by_channel_is_the_product_with_a_diagonal_matrix(dtype: torch.dtype):
    whitening = _whitening(16)
    x = (whitening.mean + torch.randn(2, 50, 16) @ whitening.inverse_matrix.float()).to(dtype)
    ours, reference = ChannelScaler(whitening=whitening), ActivationScaler(whitening=whitening)
    assert_close(ours(x), reference(x))
    assert_close(ours.unscale(ours(x)), x)
    assert_close(reference.unscale(ours(x)), x)


def test_bfloat16_activations_are_centred_before_they_are_rounded():
    whitening = _whitening(16)
    x = (whitening.mean + torch.randn(500, 16).double() @ whitening.inverse_matrix).bfloat16()
    exact = ActivationScaler(whitening=whitening)(x.double())
    ours = (ChannelScaler(whitening=whitening)(x).double() - exact).abs().max()
    assert ours < 0.02 < (ActivationScaler(whitening=whitening)(x).double() - exact).abs().max()


def _training_sae(sae_class: Any, config_class: Any, dtype: str, word: str, b_dec_to_input: bool) -> Any:
    torch.manual_seed(0)
    cfg = config_class(
        **({"k": 8} if hasattr(config_class, "k") else {}),
        d_in=16, d_sae=64, matryoshka_widths=[8, 64], dtype=dtype, apply_b_dec_to_input=b_dec_to_input,
        normalize_activations=word,
    )  # fmt: skip
    sae = sae_class(cfg)
    with torch.no_grad():
        for parameter in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec):
            parameter.normal_()
    return sae


TOLERANCES = {"float64": 1e-9, "float32": 1e-3, "bfloat16": 0.15}


@pytest.mark.parametrize("b_dec_to_input", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize(("sae_class", "config_class"), TRAINING_CLASSES)
def test_the_folded_sae_does_with_activations_what_it_did_with_whitened_ones(
    sae_class: Any, config_class: Any, word: str, dtype: str, b_dec_to_input: bool
):
    sae = _training_sae(sae_class, config_class, dtype, word, b_dec_to_input)
    whitening = _whitening(16, word)
    z = torch.randn(200, 16, dtype=torch.float64)
    x = z @ whitening.inverse_matrix + whitening.mean
    sae64 = _training_sae(sae_class, config_class, "float64", word, b_dec_to_input)
    sae64.load_state_dict({name: value.double() for name, value in sae.state_dict().items()})

    def hidden_pre(sae: Any, activations: torch.Tensor) -> torch.Tensor:
        """In float64, so that what is seen is the rounding of the weights."""
        sae = sae.double().requires_grad_(False)
        norms = sae.W_dec.norm(dim=-1) if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False) else 1
        return ((activations - b_dec_to_input * sae.b_dec) @ sae.W_enc + sae.b_enc) * norms

    expected = hidden_pre(sae64, z)
    sae.fold_activation_whitening(whitening.mean, whitening.matrix, whitening.inverse_matrix)
    assert sae.cfg.normalize_activations == "none"
    error = (hidden_pre(sae, x) - expected).abs().max() / expected.abs().max()
    assert error < TOLERANCES[dtype]
    reconstruction = (expected.relu() @ sae64.W_dec + sae64.b_dec) @ whitening.inverse_matrix + whitening.mean
    decoder = sae.W_dec.double()
    if getattr(sae64.cfg, "rescale_acts_by_decoder_norm", False):
        reconstruction = expected.relu() / sae64.W_dec.norm(dim=-1, keepdim=True).T @ sae64.W_dec + sae64.b_dec
        reconstruction = reconstruction @ whitening.inverse_matrix + whitening.mean
    ours = hidden_pre(sae, x).relu() @ decoder + sae.b_dec
    assert_close(
        ours, reconstruction, rtol=10 * TOLERANCES[dtype], atol=TOLERANCES[dtype] * float(reconstruction.abs().max())
    )


def test_what_rounding_the_decoder_bias_shifts_is_taken_back():
    sae_class, config_class = TRAINING_CLASSES[0]
    whitening = _whitening(16)
    whitening.mean[3] = 5010  # halfway between two numbers of bfloat16
    z, x = torch.zeros(1, 16, dtype=torch.float64), whitening.mean
    shifts = []
    for fold in (sae_class.fold_activation_whitening, SAE.fold_activation_whitening):
        sae = _training_sae(sae_class, config_class, "bfloat16", "channel_standardization", True)
        sae.cfg.rescale_acts_by_decoder_norm = False
        sae.b_enc.data.zero_()
        before = (z - sae.b_dec.double()) @ sae.W_enc.double()
        fold(sae, whitening.mean, whitening.matrix, whitening.inverse_matrix)
        after = (x - sae.b_dec.double()) @ sae.W_enc.double() + sae.b_enc.double()
        shifts.append((after - before).abs().mean().item())
    ours, saelens = shifts
    assert ours < saelens / 5


@pytest.mark.parametrize(("sae_class", "config_class"), TRAINING_CLASSES)
def test_no_step_is_taken_on_raw_activations(sae_class: Any, config_class: Any):
    sae = _training_sae(sae_class, config_class, "float32", "channel_standardization", True)
    with pytest.raises(ValueError, match=r"as they are: use one of the former, or .*covariance_whitening"):
        sae.training_forward_pass(train_step_input(torch.randn(8, 16)))
    sae.gets_standardized_channels = True
    sae.training_forward_pass(train_step_input(torch.randn(8, 16)))


def test_saelens_own_runner_refuses_it(tinystories: Path):
    run = tiny_run(tinystories, None, sae=tiny_sae(normalize_activations="channel_standardization"), **SHORT)
    with pytest.raises(ValueError, match=r"sae_lens_matryoshka.train"):
        LanguageModelSAETrainingRunner(build_runner_configs(run)).run()  # type: ignore[arg-type]


FIELDS: dict[str, dict[str, Any]] = {
    "matryoshka": {"k": 8, "use_matryoshka_aux_loss": True},
    "matryoshka_topk": {"k": 8},
    "matryoshka_jumprelu": {"l0_coefficient": 0.1},
    "matryoshka_standard": {"l1_coefficient": 0.1},
}


def _sae(architecture: str, word: str, **changes: Any) -> dict[str, Any]:
    shape = {field: tiny_sae()[field] for field in ("d_in", "d_sae", "matryoshka_widths")}
    return {"architecture": architecture, **shape, **FIELDS[architecture], "normalize_activations": word, **changes}


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("architecture", FIELDS)
def test_resumed_runs_end_as_uninterrupted_ones_and_are_folded(
    tinystories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, word: str
):
    samples = {**SAMPLES, "calibration_samples": 300 if architecture == "matryoshka" else None}

    def run(name: str) -> dict[str, Any]:
        return tiny_run(tinystories, tmp_path / name, sae=_sae(architecture, word), **{**SHORT, "n_checkpoints": 1})

    whole = train(run("a"), output=tmp_path / "whole", **samples)
    with monkeypatch.context() as patch:
        interrupt_at_step(patch, 7)
        with pytest.raises(KeyboardInterrupt):
            train(run("b"), output=tmp_path / "resumed", **samples)
    train(run("b"), output=tmp_path / "resumed", resume="auto", **samples)
    for folder in ("whole", "resumed"):
        (tmp_path / folder / "runner_cfg.json").unlink()
    assert_same_saes(tmp_path / "whole", tmp_path / "resumed")

    # plain SAELens, its own weights, and levels cut out of it
    sae = MatryoshkaSAE.load_from_disk(tmp_path / "whole")
    assert sae.cfg.normalize_activations == "none"
    assert sae.at_level(0).cfg.normalize_activations == "none"
    [trained] = whole.saes
    assert trained.levels[-1].fvu < 1
    # the checkpoint's training SAE, its input standardized by the checkpoint's file, is the one that was saved
    [checkpoint] = (tmp_path / "a").glob("*/[0-9]*")
    scaler = ActivationScaler()
    scaler.load(checkpoint / "activation_scaler.json")
    assert scaler.whitening is not None
    is_diagonal = scaler.whitening.matrix.equal(scaler.whitening.matrix.diagonal().diag())
    assert is_diagonal == (word == "channel_standardization")


@pytest.mark.parametrize("word", WORDS)
def test_bfloat16_parameters_do_as_float32_ones(tinystories: Path, tmp_path: Path, word: str):
    fvu: dict[str, list[float]] = {}
    for dtype in ("float32", "bfloat16"):
        run = tiny_run(tinystories, None, sae=_sae("matryoshka", word, dtype=dtype), **SHORT)
        [trained] = train(run, output=tmp_path / dtype, **SAMPLES).saes
        assert trained.incomplete is None
        assert trained.load().W_dec.dtype == getattr(torch, dtype)
        assert trained.levels[-1].l0 == pytest.approx(8, rel=0.1)
        fvu[dtype] = [level.fvu_standardized for level in trained.levels if level.fvu_standardized is not None]
    assert fvu["bfloat16"] == pytest.approx(fvu["float32"], rel=0.05)


def test_statistics_are_those_of_the_batches_that_saelens_would_have_taken(tinystories: Path, tmp_path: Path):
    run = tiny_run(tinystories, tmp_path, sae=_sae("matryoshka", "channel_standardization"), **SHORT)
    cfg: Any = build_runner_configs(run)
    runner = language_model.language_model_runner(cfg, language_model.CheckpointOptions())
    x = torch.cat([next(runner.activations_store) for _ in range(cfg.n_batches_for_norm_estimate)])
    expected = channel_statistics_reference(x)
    train(run, output=tmp_path / "out", **SAMPLES)
    [checkpoint, *_] = sorted(tmp_path.glob("*/[0-9]*"))
    saved = load_file(checkpoint / "activation_whitening.safetensors")
    assert_close(saved["mean"], expected.mean)
    assert_close(saved["inverse_matrix"], expected.standard_deviation.diag())


def test_several_saes_on_one_hook_have_the_same_statistics(tinystories: Path, tmp_path: Path):
    word = "channel_standardization"
    saes = {"a": tiny_sae(normalize_activations=word), "b": tiny_sae(k=4, normalize_activations=word),
            "c": tiny_sae(normalize_activations="covariance_whitening"), "d": tiny_sae()}  # fmt: skip
    hooks = {"a": "model.layers.2", "b": "model.layers.2", "c": "model.layers.2", "d": "model.layers.1"}
    run = tiny_multi_run(tinystories, tmp_path / "checkpoints", saes=saes, hook_names=hooks, **SHORT)
    result = train(run, output=tmp_path / "out", **SAMPLES)
    assert all(sae.incomplete is None and sae.load().cfg.normalize_activations == "none" for sae in result.saes)
    checkpoint = sorted((tmp_path / "checkpoints").glob("*/[0-9]*"))[0]
    a, b = (load_file(checkpoint / name / "activation_whitening.safetensors") for name in "ab")
    assert all(a[name].equal(b[name]) for name in a)
    assert json.loads((checkpoint / "d" / "activation_scaler.json").read_text())["has_whitening"] is False


def test_training_on_goes_on_with_the_statistics_of_the_checkpoint(tinystories: Path, tmp_path: Path):
    sae = _sae("matryoshka", "channel_standardization")
    run = tiny_run(tinystories, tmp_path / "first", sae=sae, **{**SHORT, "n_checkpoints": 1})
    saved = train(run, output=tmp_path / "saved", **SAMPLES).output
    [checkpoint] = (tmp_path / "first").glob("*/[0-9]*")
    on = tiny_run(tinystories, tmp_path / "on", sae=sae, from_pretrained_path=str(checkpoint), **SHORT)
    train(on, output=tmp_path / "trained_on", **SAMPLES)
    before, after = (
        load_file(folder / "activation_whitening.safetensors")
        for folder in (checkpoint, sorted((tmp_path / "on").glob("*/[0-9]*"))[0])
    )
    assert all(before[name].equal(after[name]) for name in before)
    refused = {**on, "sae": {**sae, "rescale_acts_by_decoder_norm": False}, "from_pretrained_path": str(saved)}
    with pytest.raises(ConfigError, match=r"set sae.normalize_activations=none"):
        train(refused, output=tmp_path / "refused", **SAMPLES)
    (checkpoint / "activation_whitening.safetensors").unlink()
    with pytest.raises(UserError, match=r"damaged|missing"):
        train(on, output=tmp_path / "refused", **SAMPLES)


@pytest.mark.parametrize("word", WORDS)
def test_weights_are_not_gone_on_with_without_their_statistics(tinystories: Path, tmp_path: Path, word: str):
    run = tiny_run(tinystories, tmp_path / "a", sae=_sae("matryoshka", word), **{**SHORT, "n_checkpoints": 1})
    train(run, output=tmp_path / "out", **SAMPLES)
    [checkpoint] = (tmp_path / "a").glob("*/[0-9]*")
    (checkpoint / "activation_whitening.safetensors").unlink()
    (checkpoint / MANIFEST_FILENAME).unlink()  # as SAELens's own checkpoints
    with pytest.raises(UserError, match=r"activation_whitening.safetensors is missing"):
        train(run, output=tmp_path / "again", resume=checkpoint, **SAMPLES)


def _with_channel(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a channel of the hook's activations hold one value."""
    next_batch = ActivationsStore.__next__

    def replaced(store: ActivationsStore) -> torch.Tensor:
        batch = next_batch(store).clone()
        batch[:, 5] = value
        return batch

    monkeypatch.setattr(ActivationsStore, "__next__", replaced)


@pytest.mark.parametrize(("value", "message"), [
    (3.7, "Channel 5 of model.layers.2 never varies .always 3.7.*covariance_whitening"),
    (float("nan"), "activations at model.layers.2 cannot be standardized: 128 values are not finite"),
])  # fmt: skip
def test_channels_that_cannot_be_standardized(
    tinystories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, message: str
):
    _with_channel(value, monkeypatch)
    run = tiny_run(tinystories, None, sae=_sae("matryoshka", "channel_standardization"), **SHORT)
    with pytest.raises(UserError, match=message):
        train(run, output=tmp_path / "out", **SAMPLES)
    run["sae"]["normalize_activations"] = "covariance_whitening"
    if value == 3.7:  # which the message recommends
        assert train(run, output=tmp_path / "out", **SAMPLES).saes[0].incomplete is None
        return
    with pytest.raises(UserError):
        train(run, output=tmp_path / "out", **SAMPLES)


@pytest.mark.parametrize(("architecture", "instead"), [
    ("batchtopk", "architecture=matryoshka with matryoshka_widths=.128."),
    ("jumprelu", "architecture=matryoshka_jumprelu"),
    ("gated", "normalize_activations=covariance_whitening"),
])  # fmt: skip
def test_saelens_own_saes_refuse_it_and_name_what_to_use(tinystories: Path, architecture: str, instead: str):
    sae = {"architecture": architecture, "d_in": 64, "d_sae": 128, "normalize_activations": "channel_standardization"}
    with pytest.raises(ConfigError, match=f"SAELens's {architecture} does not take it; set sae.{instead}"):
        check_run_file(tiny_run(tinystories, None, sae=sae))


def test_synthetic_runs_refuse_it():
    run = read_run_file("synthetic", [], [])
    run["saes"][0]["normalize_activations"] = "channel_standardization"
    with pytest.raises(ConfigError, match="is for language models"):
        check_run_file(run)


def test_what_is_not_folded_yet_is_no_sae_for_inference():
    sae_class, config_class = TRAINING_CLASSES[0]
    sae = _training_sae(sae_class, config_class, "float32", "channel_standardization", True)
    with pytest.raises(ValueError, match="not folded into these weights yet"):
        MatryoshkaSAE.from_sae(sae)
    copied: Any = TrainingSAE.from_dict(sae.cfg.to_dict())
    assert copied.cfg.normalize_activations == "channel_standardization"
