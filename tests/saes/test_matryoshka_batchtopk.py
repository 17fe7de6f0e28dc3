"""Training beside SAELens's own Matryoshka SAE, level weights against plain float64 PyTorch, and the threshold."""

import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import (
    SAE,
    LoggingConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
    SAETrainer,
    TrainingSAE,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor

from sae_lens_matryoshka import MatryoshkaSAE, MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig
from tests.saes.step_inputs import dead_mask, train_step_input

SIZES: dict[str, Any] = {"d_in": 16, "d_sae": 64, "k": 4, "matryoshka_widths": [8, 24, 64]}
BATCH_SIZE = 128


def _activations(seed: int = 0) -> Iterator[Tensor]:
    """Sparse combinations of fixed directions, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(40, SIZES["d_in"], generator=generator)
    while True:
        coefficients = torch.rand(BATCH_SIZE, 40, generator=generator)
        yield (coefficients * (coefficients > 0.9)) @ directions


def _trainer(sae: TrainingSAE[Any], n_steps: int) -> SAETrainer[Any, Any]:
    cfg = SAETrainerConfig(n_steps * BATCH_SIZE, BATCH_SIZE, lr=3e-3, lr_end=3e-3, dead_feature_window=10)
    return SAETrainer(cfg, sae, _activations())


def _step_input(sae_in: Tensor, is_logging_step: bool = False) -> TrainStepInput:
    return train_step_input(sae_in, dead_mask([3, 30, 31], SIZES["d_sae"]), is_logging_step=is_logging_step)


@pytest.mark.parametrize("options", [{}, {"use_matryoshka_aux_loss": True}, {"rescale_acts_by_decoder_norm": False}])
def test_a_hundred_steps_have_the_losses_of_saelens(options: dict[str, Any]):
    torch.manual_seed(0)
    ours = MatryoshkaTrainingSAE(MatryoshkaTrainingSAEConfig(**SIZES, **options))
    torch.manual_seed(0)
    theirs = MatryoshkaBatchTopKTrainingSAE(MatryoshkaBatchTopKTrainingSAEConfig(**SIZES, **options))
    trainers = [_trainer(sae, 100) for sae in (ours, theirs)]
    losses_of_dead_latents = 0
    for step, batch in enumerate(_activations()):
        if step == 100:
            break
        our_output, their_output = (trainer.step(batch) for trainer in trainers)
        for trainer in trainers:
            trainer.n_training_steps += 1
        assert our_output.losses.keys() == their_output.losses.keys()
        torch.testing.assert_close(our_output.loss, their_output.loss, rtol=1e-4, atol=0)
        torch.testing.assert_close(our_output.losses, their_output.losses, rtol=1e-4, atol=1e-7)
        losses_of_dead_latents += our_output.losses["auxiliary_reconstruction_loss"].item() > 0
    assert losses_of_dead_latents > 0  # else the auxiliary loss has not been compared


def test_level_weights_against_float64_reference():
    weights = [0.5, 0.0, 2.0]
    torch.manual_seed(1)
    sae = MatryoshkaTrainingSAE(MatryoshkaTrainingSAEConfig(**SIZES, level_weights=weights, dtype="float64"))
    x = next(_activations()).double()
    output = sae.training_forward_pass(_step_input(x))
    gradients = torch.autograd.grad(output.loss, list(sae.parameters()), retain_graph=True)

    norms = sae.W_dec.norm(dim=-1)
    hidden_pre = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc) * norms
    selected = torch.zeros(hidden_pre.numel(), dtype=torch.bool)
    selected[hidden_pre.relu().flatten().topk(4 * BATCH_SIZE).indices] = True
    coefficients = hidden_pre.relu() * selected.reshape(hidden_pre.shape) / norms
    expected = torch.zeros((), dtype=torch.float64)
    for weight, width in zip(weights, SIZES["matryoshka_widths"], strict=True):
        reconstruction = coefficients[:, :width] @ sae.W_dec[:width] + sae.b_dec
        level_loss = (x - reconstruction).pow(2).sum(-1).mean()
        name = "mse_loss" if width == 64 else f"inner_mse_loss_{width}"
        torch.testing.assert_close(output.losses[name], level_loss, rtol=1e-9, atol=0)
        expected = expected + weight * level_loss
    expected = expected + output.losses["auxiliary_reconstruction_loss"]
    torch.testing.assert_close(output.loss, expected, rtol=1e-9, atol=0)
    for ours, reference in zip(gradients, torch.autograd.grad(expected, list(sae.parameters())), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-12)


def test_the_running_threshold_is_unbiased_from_the_first_step():
    sae = MatryoshkaTrainingSAE(MatryoshkaTrainingSAEConfig(**SIZES, topk_threshold_lr=0.1))
    minima: list[float] = []
    for batch in _activations():
        output = sae.training_forward_pass(_step_input(batch))
        acts = output.feature_acts.to_dense()
        minima.append(acts[acts > 0].min().item())
        # the definition: an average whose weights fall by 0.9 a step into the past
        weights = [0.9 ** (len(minima) - 1 - step) for step in range(len(minima))]
        expected = sum(w * m for w, m in zip(weights, minima, strict=True)) / sum(weights)
        just_below = expected * (1 - 4 * torch.finfo(torch.float32).eps)
        assert sae.topk_threshold.item() == pytest.approx(just_below, rel=1e-9)
        if len(minima) == 30:
            break
    before = sae.topk_threshold.item()
    sae.update_topk_threshold(torch.zeros(4, 64))
    assert sae.topk_threshold.item() == before


def test_level_metrics_only_on_logging_steps():
    sae = MatryoshkaTrainingSAE(MatryoshkaTrainingSAEConfig(**SIZES))
    x = next(_activations())
    assert not any("level" in name for name in sae.training_forward_pass(_step_input(x)).metrics)
    output = sae.training_forward_pass(_step_input(x, is_logging_step=True))
    variance = (x - x.mean(0)).pow(2).sum() / BATCH_SIZE
    for width, dead in zip((8, 24, 64), (1, 1, 3), strict=True):
        level_loss = output.losses["mse_loss" if width == 64 else f"inner_mse_loss_{width}"]
        assert output.metrics[f"fvu_level_{width}"] == pytest.approx((level_loss / variance).item())
        expected_l0 = (output.feature_acts.to_dense()[:, :width] > 0).sum().item() / BATCH_SIZE
        assert output.metrics[f"l0_level_{width}"] == pytest.approx(expected_l0)
        assert output.metrics[f"dead_level_{width}"] == dead


def test_level_metrics_are_logged_by_the_trainer(monkeypatch: pytest.MonkeyPatch):
    logged: list[dict[str, Any]] = []
    monkeypatch.setattr("wandb.log", lambda metrics, **_: logged.append(metrics))
    sae = MatryoshkaTrainingSAE(MatryoshkaTrainingSAEConfig(**SIZES))
    cfg = SAETrainerConfig(
        4 * BATCH_SIZE,
        BATCH_SIZE,
        lr_end=3e-4,
        logger=LoggingConfig(wandb_log_frequency=2, eval_every_n_wandb_logs=10**6),
    )
    SAETrainer(cfg, sae, _activations()).fit()
    with_levels = [metrics for metrics in logged if "metrics/fvu_level_8" in metrics]
    assert len(with_levels) == 2
    assert {"metrics/fvu_level_64", "metrics/l0_level_24", "metrics/dead_level_8"} <= with_levels[0].keys()


def test_the_config_copies_the_widths():
    widths = [8, 24, 64]
    cfg = MatryoshkaTrainingSAEConfig(16, 64, k=4, matryoshka_widths=widths)
    MatryoshkaTrainingSAE(cfg)
    assert cfg.matryoshka_widths == widths
    assert cfg.matryoshka_widths is not widths


def test_a_missing_full_level_is_added_to_config_and_metadata_but_not_to_the_callers_list():
    widths = [8, 24]
    with pytest.warns(UserWarning, match="full level of width 64"):
        cfg = MatryoshkaTrainingSAEConfig(16, 64, k=4, matryoshka_widths=widths)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MatryoshkaTrainingSAE(cfg)
    assert widths == [8, 24]
    assert cfg.matryoshka_widths == [8, 24, 64]
    assert cfg.to_dict()["metadata"]["training_architecture_details"]["matryoshka_widths"] == [8, 24, 64]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"matryoshka_widths": []}, r"matryoshka_widths=\[\] is empty"),
        ({"matryoshka_widths": [8, 100]}, "100 is above d_sae=64"),
        ({"level_weights": [1.0]}, "one weight for each of the 3 levels"),
        ({"level_weights": [1.0, math.nan, 1.0]}, "nan is not a finite number"),
        ({"k": 0}, "k=0 must be a positive number"),
        ({"k": -1.5}, "k=-1.5 must be a positive number"),
        ({"k": math.nan}, "k=nan must be a positive number"),
        ({"k": 65}, "k=65 is above d_sae=64"),
    ],
)
def test_unusable_configs_fail_when_they_are_made(changed: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        MatryoshkaTrainingSAEConfig(**{**SIZES, **changed})


def test_the_config_survives_a_round_trip_through_a_dictionary():
    cfg = MatryoshkaTrainingSAEConfig(**SIZES, level_weights=[1, 2, 3])
    assert MatryoshkaTrainingSAEConfig.from_dict(cfg.to_dict()) == cfg


def test_a_checkpoint_restores_the_training_sae(tmp_path: Path):
    sae = MatryoshkaTrainingSAE(MatryoshkaTrainingSAEConfig(**SIZES))
    _trainer(sae, 20).fit()
    sae.save_model(tmp_path)
    restored = TrainingSAE.load_from_disk(tmp_path)
    assert isinstance(restored, MatryoshkaTrainingSAE)
    # loading casts the threshold to the dtype of the parameters, as with SAELens's own class
    torch.testing.assert_close(restored.state_dict(), sae.state_dict(), check_dtype=False)
    assert restored.topk_threshold_updates == 20
    with pytest.raises(ValueError, match="training checkpoint"):
        MatryoshkaSAE.load_from_disk(tmp_path)


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_batch_selects_fires_in_the_saved_sae(tmp_path: Path, dtype: str, rescale: bool):
    """Also the smallest of it, at which the threshold of a batch that stays the same arrives."""
    options: dict[str, Any] = {"dtype": dtype, "rescale_acts_by_decoder_norm": rescale}
    for seed in range(5):
        torch.manual_seed(seed)
        sae = MatryoshkaTrainingSAE(MatryoshkaTrainingSAEConfig(**{**SIZES, **options}))
        x = torch.randn(64, SIZES["d_in"]).to(sae.dtype)
        selected = [sae.training_forward_pass(train_step_input(x)).feature_acts.to_dense() > 0 for _ in range(3)][-1]
        sae.save_inference_model(tmp_path / str(seed))
        saved = SAE.load_from_disk(tmp_path / str(seed))
        fired = saved.encode(x) > 0
        # in bfloat16 neighbours of the smallest may round to it, and fire too
        assert not (selected & ~fired).any()
        assert fired.sum().item() == pytest.approx(selected.sum().item(), rel=0 if dtype == "float32" else 0.05)


def test_states_load_strictly_into_saelens_own_class_and_back():
    ours = MatryoshkaTrainingSAE(MatryoshkaTrainingSAEConfig(**SIZES, order_latents_by="contribution"))
    theirs = MatryoshkaBatchTopKTrainingSAE(MatryoshkaBatchTopKTrainingSAEConfig(**SIZES))
    _trainer(ours, 5).fit()
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(dict(theirs.state_dict()), dict(ours.state_dict()))
    again = MatryoshkaTrainingSAE(ours.cfg)
    again.load_state_dict(ours.state_dict())
    torch.testing.assert_close(again.statistics, ours.statistics, rtol=0, atol=0)
    assert again.statistics["topk_threshold_updates"] == 5
    again.load_state_dict(theirs.state_dict())  # which has none: they start afresh
    assert again.statistics["topk_threshold_updates"] == 0
    assert not again.statistics["latent_order_statistic"].any()


def test_a_checkpoint_of_saelens_own_class_can_be_continued(tmp_path: Path):
    theirs = MatryoshkaBatchTopKTrainingSAE(MatryoshkaBatchTopKTrainingSAEConfig(**SIZES))
    theirs.save_model(tmp_path)
    ours = MatryoshkaTrainingSAE(MatryoshkaTrainingSAEConfig(**SIZES))
    ours.load_weights_from_checkpoint(tmp_path)
    torch.testing.assert_close(ours.W_dec, theirs.W_dec)
