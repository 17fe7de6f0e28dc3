"""The options that all variants share: ordering, drawn prefixes, their resumption, and combinations refused."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAETrainer, TrainingSAE
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from torch import Tensor

from sae_lens_matryoshka import MatryoshkaSAE, MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig
from tests.saes.step_inputs import activations, dead_mask, train_step_input

ARCHITECTURES = ["matryoshka", "matryoshka_topk", "matryoshka_jumprelu", "matryoshka_standard"]


def _config(architecture: str, **options: Any) -> Any:
    k = {"k": 3} if architecture in ("matryoshka", "matryoshka_topk") else {}
    config_class = SAE_TRAINING_CLASS_REGISTRY[architecture][1]
    return config_class(**{"d_in": 6, "d_sae": 24, "matryoshka_widths": [3, 8, 24], **k, **options})


def _trainer(architecture: str, n_steps: int = 20, **options: Any) -> SAETrainer[Any, Any]:
    torch.manual_seed(0)
    sae = SAE_TRAINING_CLASS_REGISTRY[architecture][0](_config(architecture, **options))
    cfg = SAETrainerConfig(n_steps * 32, 32, lr=1e-2, lr_end=1e-2, dead_feature_window=3)
    return SAETrainer(cfg, sae, iter(()))


def _train(trainer: SAETrainer[Any, Any], steps: range) -> list[float]:
    losses: list[float] = []
    for step in steps:
        x = activations(32, 6, step).to(trainer.sae.dtype)
        losses.append(trainer.step(x).loss.item())
        trainer.n_training_steps += 1
    return losses


def _move_latents(trainer: SAETrainer[Any, Any], order: Tensor):
    """Put latents in order by moving parameters, optimizer state and statistics together, as Nabeshima describes it."""
    sae = trainer.sae
    for name, parameter in sae.named_parameters():
        tensors = [parameter.data, *(trainer.optimizer.state[parameter][key] for key in ("exp_avg", "exp_avg_sq"))]
        for tensor in tensors:
            if name == "W_enc":
                tensor.copy_(tensor[:, order])
            elif name != "b_dec":
                tensor.copy_(tensor[order])
    for tensor in (trainer.n_forward_passes_since_fired, trainer.act_freq_scores):
        tensor.copy_(tensor[order])


@pytest.mark.parametrize("order_by", ["contribution", "firing_frequency"])
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ordering_equals_moving_parameters_and_optimizer_state_together(
    architecture: str, sampled: bool, order_by: str
):
    options: dict[str, Any] = {"dtype": "float64"}
    if sampled:
        options["prefix_sampling"] = {"n_prefixes": 4}
    ours = _trainer(architecture, **options, order_latents_by=order_by, latent_order_lr=0.05)
    moved = _trainer(architecture, **options)
    contribution = torch.zeros(24, dtype=torch.float64)
    orders: set[tuple[int, ...]] = set()
    for step in range(20):
        x = activations(32, 6, step, torch.float64)
        outputs = []
        with torch.no_grad():  # before the step, which changes the decoder
            norms = moved.sae.W_dec.norm(dim=-1)
        for trainer in (ours, moved):
            outputs.append(trainer.step(x))
            trainer.n_training_steps += 1
        torch.testing.assert_close(outputs[0].loss, outputs[1].loss, rtol=1e-6, atol=0)
        acts = outputs[1].feature_acts.detach().to_dense()
        if "topk" not in architecture and architecture != "matryoshka":
            acts = acts * norms  # those of TopK are in units of the decoder norm already
        of_step = acts.pow(2).mean(0) if order_by == "contribution" else (acts > 0).double().mean(0)
        contribution = 0.95 * contribution + 0.05 * of_step
        order = contribution.argsort(descending=True, stable=True)
        orders.add(tuple(order.tolist()))
        _move_latents(moved, order)
        contribution = contribution[order]
    assert len(orders) > 10  # latents did change places
    saved = [MatryoshkaSAE.from_sae(trainer.sae) for trainer in (ours, moved)]
    for (name, first), second in zip(saved[0].named_parameters(), saved[1].parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-7, check_dtype=False, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_permutation_within_a_level_changes_no_loss(architecture: str):
    first, second = (_trainer(architecture).sae for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    bounds = [(0, 3), (3, 8), (8, 24)]
    order = torch.cat([start + torch.randperm(stop - start, generator=generator) for start, stop in bounds])
    with torch.no_grad():
        for name, parameter in second.named_parameters():
            if name != "b_dec":
                parameter.copy_(parameter[:, order] if name == "W_enc" else parameter[order])
    x = torch.randn(32, 6, generator=generator)
    losses = [sae.training_forward_pass(train_step_input(x)).losses for sae in (first, second)]
    assert losses[0].keys() == losses[1].keys() >= {"inner_mse_loss_3", "inner_mse_loss_8", "mse_loss"}
    for name, loss in losses[0].items():
        torch.testing.assert_close(loss, losses[1][name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("order_by", ["contribution", "firing_frequency"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_run_resumed_from_a_checkpoint_is_bit_equal(architecture: str, order_by: str, tmp_path: Path):
    options: dict[str, Any] = {
        "prefix_sampling": {"n_prefixes": 4, "seed": 5},
        "order_latents_by": order_by,
        "stop_gradient_between_levels": "inner",
        "loss_tilt": 0.1,
        "aligned_encoder": True,
    }
    if architecture in ("matryoshka", "matryoshka_topk"):
        options |= {"k_start": 9.0, "k_anneal_steps": 16}
    whole = _trainer(architecture, **options)
    losses = _train(whole, range(20))
    first = _trainer(architecture, **options)
    _train(first, range(12))
    first.save_checkpoint("at_12", base_path=tmp_path)
    resumed = _trainer(architecture, **options)
    resumed.load_trainer_state(tmp_path / "at_12")
    resumed.sae.load_weights_from_checkpoint(tmp_path / "at_12")
    assert _train(resumed, range(12, 20)) == losses[12:]
    for name, tensor in whole.sae.state_dict().items():
        assert tensor.equal(resumed.sae.state_dict()[name]), name
    assert len(set(losses)) == 20


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_checkpoint_read_by_saelens_trains_on_and_its_statistics_keep_their_dtype(
    architecture: str, dtype: str, tmp_path: Path
):
    trainer = _trainer(architecture, dtype=dtype, order_latents_by="contribution")
    _train(trainer, range(3))
    trainer.sae.save_model(tmp_path / "checkpoint")
    loaded: Any = TrainingSAE.load_from_disk(tmp_path / "checkpoint")
    for name, tensor in trainer.sae.named_buffers():
        if name != "topk_threshold":  # SAELens's own, which SAELens casts
            assert loaded.get_buffer(name).dtype == tensor.dtype, name
            if dtype != "bfloat16":
                torch.testing.assert_close(loaded.get_buffer(name), tensor, rtol=1e-6, atol=0)
    x = activations(32, 6, 9).to(loaded.dtype)
    loaded.training_forward_pass(train_step_input(x, step=3)).loss.backward()
    with pytest.raises(ValueError, match="is a training checkpoint, not a saved SAE"):
        MatryoshkaSAE.load_from_disk(tmp_path / "checkpoint")
    trainer.sae.save_inference_model(tmp_path / "saved")
    assert MatryoshkaSAE.load_from_disk(tmp_path / "saved").widths == [3, 8, 24]


@pytest.mark.parametrize(("architecture", "twin"), [("matryoshka", "batchtopk"), ("matryoshka_standard", "standard")])
def test_a_checkpoint_of_the_twin_can_be_trained_on(architecture: str, twin: str, tmp_path: Path):
    twin_class, twin_config = SAE_TRAINING_CLASS_REGISTRY[twin]
    twin_class(twin_config(d_in=6, d_sae=24)).save_model(tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(
        json.dumps({**cfg, "architecture": architecture, "k": 3, "matryoshka_widths": [3, 24]})
    )
    sae: Any = TrainingSAE.load_from_disk(tmp_path)
    assert sae.training_forward_pass(train_step_input(activations(32, 6, 9))).loss.isfinite()


@pytest.mark.parametrize("normalize", ["layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_copy_trains_as_its_original(architecture: str, normalize: str):
    sae = _trainer(architecture, normalize_activations=normalize).sae
    step_inputs = [train_step_input(activations(n, 6, n)) for n in (32, 20)]
    sae.training_forward_pass(step_inputs[0])
    copied = copy.deepcopy(sae)
    losses = [one.training_forward_pass(step_inputs[1]).loss for one in (copied, sae)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)


def test_drawn_prefixes_are_trained_and_the_levels_are_reported():
    trainer = _trainer("matryoshka", prefix_sampling={"n_prefixes": 4})
    sae = trainer.sae
    x = activations(32, 6, 0)
    output = sae.training_forward_pass(train_step_input(x, dead_mask([], 24), step=3, is_logging_step=True))
    widths = sae.prefixes(3).widths
    assert widths == sae.cfg.prefix_law.draw(24, 3)
    assert widths != sae.prefixes(4).widths
    coefficients = output.feature_acts.to_dense() / sae.W_dec.norm(dim=-1)
    errors = {w: (coefficients[:, :w] @ sae.W_dec[:w] + sae.b_dec - x).pow(2).sum(-1).mean() for w in [3, 8, *widths]}
    torch.testing.assert_close(output.loss, torch.stack([errors[width] for width in widths]).sum())
    torch.testing.assert_close(
        output.losses["prefix_mse_loss"], torch.stack([errors[width] for width in widths[:-1]]).mean()
    )
    variance = (x - x.mean(0)).pow(2).sum(-1).mean()
    for width in (3, 8, 24):
        torch.testing.assert_close(output.metrics[f"fvu_level_{width}"], errors[width] / variance)
        of_channels = (coefficients[:, :width] @ sae.W_dec[:width] + sae.b_dec - x).pow(2).mean(0) / x.var(0, False)
        torch.testing.assert_close(output.metrics[f"fvu_standardized_level_{width}"], of_channels.mean())
    assert set(output.losses) == {"mse_loss", "auxiliary_reconstruction_loss", "prefix_mse_loss"}


@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("hooked", [False, True])
def test_logged_figures_of_levels_are_those_of_their_reconstructions(architecture: str, normalize: str, hooked: bool):
    sae = _trainer(architecture, normalize_activations=normalize).sae
    if hooked:  # then SAELens's own code is taken
        sae.hook_sae_recons.add_hook(lambda tensor, hook: tensor)
    x = activations(32, 6, 0)
    output = sae.training_forward_pass(train_step_input(x, is_logging_step=True))
    sae.process_sae_in(x)
    reconstructions = sae._reconstructions(output.feature_acts, sae.prefixes(0))
    for width, reconstruction in zip([3, 8, 24], reconstructions, strict=True):
        of_channels = (reconstruction - x).pow(2).mean(0) / x.var(0, unbiased=False)
        torch.testing.assert_close(output.metrics[f"fvu_standardized_level_{width}"], of_channels.mean())
        fvu = (reconstruction - x).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
        torch.testing.assert_close(output.metrics[f"fvu_level_{width}"], fvu)


def test_with_a_stopped_gradient_larger_levels_do_not_move_smaller_ones():
    sae = _trainer("matryoshka", stop_gradient_between_levels=True, level_weights=[1.0, 1.0, 1000.0]).sae
    plain = _trainer("matryoshka").sae
    x = activations(32, 6, 0)
    for one in (sae, plain):
        one.training_forward_pass(train_step_input(x)).loss.backward()
    alone: TrainingSAE[Any] = MatryoshkaTrainingSAE(
        MatryoshkaTrainingSAEConfig(6, 24, k=3, matryoshka_widths=[3, 8, 24], level_weights=[1.0, 0.0, 0.0])
    )
    alone.load_state_dict(plain.state_dict())
    alone.training_forward_pass(train_step_input(x)).loss.backward()
    stopped, expected, usual = (dict(one.named_parameters())["W_dec"].grad for one in (sae, alone, plain))
    assert stopped is not None and expected is not None and usual is not None  # noqa: PT018
    torch.testing.assert_close(stopped[:3], expected[:3])
    assert not torch.allclose(usual[:3], expected[:3])


@pytest.mark.parametrize(
    ("architecture", "options", "message"),
    [
        ("matryoshka", {"prefix_sampling": {}, "level_weights": [1.0, 1.0, 1.0]}, "exclude each other"),
        ("matryoshka_topk", {"matryoshka_widths": [24], "snap_loss": True}, "snap_loss=True changes nothing"),
        (
            "matryoshka_standard",
            {"matryoshka_widths": [24], "stop_gradient_between_levels": True},
            "stop_gradient_between_levels=True changes nothing",
        ),
        (
            "matryoshka_jumprelu",
            {"matryoshka_widths": [24], "order_latents_by": "contribution"},
            "order_latents_by='contribution' changes nothing",
        ),
        (
            "matryoshka",
            {"stop_gradient_between_levels": True, "level_weights": [1.0, 0.0, 1.0]},
            "leaves the latents of a level of weight 0 untrained",
        ),
        ("matryoshka", {"prefix_sampling": {"n_prefixes": 40}}, "needs 39 different lengths"),
        ("matryoshka", {"latent_order_lr": 0.0}, "latent_order_lr=0.0 must be above 0"),
        ("matryoshka", {"latent_order_lr": 0.1}, "latent_order_lr=0.1 is for order_latents_by, which is not set"),
        (
            "matryoshka",
            {"order_latents_by": "size"},
            "order_latents_by='size' must be one of contribution, firing_freq",
        ),
        ("matryoshka", {"stop_gradient_between_levels": "outer"}, "must be true, false or inner"),
        ("matryoshka_standard", {"loss_tilt": float("nan")}, "loss_tilt=nan must be a number"),
        ("matryoshka", {"k_start": 3}, "k_start=3 must be above k=3"),
        ("matryoshka", {"k_start": 25}, "k_start=25 is above d_sae=24"),
        (
            "matryoshka_topk",
            {"k_start": 9, "k_anneal_steps": 0},
            "k_anneal_steps=0 must be a whole number of at least 1",
        ),
        ("matryoshka_topk", {"k_anneal_steps": 5}, "k_anneal_steps=5 is for k_start, which is not set"),
        ("matryoshka_topk", {"k": 2.5}, r"k=2\.5 must be a whole number"),
        ("matryoshka_topk", {"k": 25}, "k=25 is above d_sae=24"),
        ("matryoshka_jumprelu", {"jumprelu_sparsity_loss_mode": "quadratic"}, "target_l0=None must be above 0"),
        ("matryoshka_jumprelu", {"jumprelu_sparsity_loss_mode": "l1"}, "must be one of step, tanh, quadratic"),
        ("matryoshka_jumprelu", {"jumprelu_bandwidth": 0}, "jumprelu_bandwidth=0 must be positive"),
        ("matryoshka_standard", {"l1_of_every_prefix": True, "lp_norm": 2.0}, "needs lp_norm=1"),
        ("matryoshka_standard", {"matryoshka_widths": [8, 3]}, "must be strictly increasing"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(architecture: str, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        _config(architecture, **options)
