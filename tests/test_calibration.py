"""The calibrated threshold against the definition: count what fires on the same samples."""

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, TopKSAE, TopKSAEConfig
from torch import Tensor

from sae_lens_matryoshka import (
    MatryoshkaJumpReLUSAE,
    MatryoshkaSAE,
    MatryoshkaTrainingSAE,
    MatryoshkaTrainingSAEConfig,
    calibrate_threshold,
)
from sae_lens_matryoshka.ops import selection
from tests.conftest import random_matryoshka_sae
from tests.largest_array import LargestArray


def _batches(n_batches: int = 4, batch_size: int = 50, d_in: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch_size, d_in, generator=generator) for _ in range(n_batches)]


def _mean_l0(sae: MatryoshkaSAE, batches: list[Tensor]) -> float:
    return (sae.encode(torch.cat(batches)) != 0).sum(-1).float().mean().item()


@settings(max_examples=30, deadline=None)
@given(target_l0=st.floats(0.1, 7), n_samples=st.integers(1, 200))
def test_exactly_the_wanted_number_of_latents_fires_on_the_calibration_samples(target_l0: float, n_samples: int):
    sae = random_matryoshka_sae([5, 20])
    before = sae.threshold.detach().clone()
    calibration = calibrate_threshold(sae, _batches(), n_samples, target_l0)
    samples = torch.cat(_batches())[:n_samples]
    n_to_fire = max(1, round(target_l0 * n_samples))
    assert (sae.encode(samples) != 0).sum().item() == n_to_fire
    assert calibration.l0_after == pytest.approx(n_to_fire / n_samples)
    assert calibration.n_samples == n_samples
    torch.testing.assert_close(sae.threshold - before, torch.full_like(before, calibration.shift))


def test_l0_before_is_what_fired_before(matryoshka_sae: MatryoshkaJumpReLUSAE):
    expected = _mean_l0(matryoshka_sae, _batches())
    assert calibrate_threshold(matryoshka_sae, _batches(), 200, 2).l0_before == pytest.approx(expected)


def test_more_latents_than_can_fire_make_every_positive_pre_activation_fire(matryoshka_sae: MatryoshkaJumpReLUSAE):
    calibration = calibrate_threshold(matryoshka_sae, _batches(), 200, target_l0=20)
    x = torch.cat(_batches())
    hidden_pre = (x - matryoshka_sae.b_dec) @ matryoshka_sae.W_enc + matryoshka_sae.b_enc
    assert _mean_l0(matryoshka_sae, _batches()) == pytest.approx((hidden_pre > 0).sum(-1).float().mean().item())
    assert calibration.l0_after == pytest.approx(_mean_l0(matryoshka_sae, _batches()))


@pytest.mark.parametrize("rescale_acts_by_decoder_norm", [True, False])
@pytest.mark.parametrize("plugin", [True, False])
def test_a_training_sae_is_saved_with_the_calibrated_threshold(plugin: bool, rescale_acts_by_decoder_norm: bool):
    options: dict[str, Any] = {"k": 3.0, "rescale_acts_by_decoder_norm": rescale_acts_by_decoder_norm}
    torch.manual_seed(0)
    sae = (
        MatryoshkaTrainingSAE(MatryoshkaTrainingSAEConfig(6, 20, matryoshka_widths=[5, 20], **options))
        if plugin
        else BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(6, 20, **options))
    )
    with torch.no_grad():
        sae.W_dec.normal_()
    calibrate_threshold(sae, _batches(), 200)
    saved = MatryoshkaSAE.from_sae(sae, widths=[5, 20])
    assert _mean_l0(saved, _batches()) == pytest.approx(3, abs=0.02)


@pytest.mark.parametrize("plugin", [True, False])
def test_chunks_of_columns_give_the_same_and_bound_the_memory(plugin: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(selection, "CHUNK_ELEMENTS", 50_000)
    torch.manual_seed(0)
    sae = MatryoshkaTrainingSAE(MatryoshkaTrainingSAEConfig(6, 500, k=2, matryoshka_widths=[500]))
    sae.topk_threshold += 1.5
    if not plugin:
        sae = MatryoshkaSAE.from_sae(sae)
    batches = _batches(4, batch_size=1000)
    with LargestArray() as largest:
        calibration = calibrate_threshold(sae, batches, 4000)  # type: ignore[arg-type]
    # a chunk of pre-activations, and the largest values so far with those of a chunk
    assert largest.n_elements <= 2 * 2 * 4000 + 50_000
    saved = MatryoshkaSAE.from_sae(sae)
    assert _mean_l0(saved, batches) == pytest.approx(2, abs=1e-3) == calibration.l0_after


def test_a_latent_that_never_fires_stays_silent(matryoshka_sae: MatryoshkaJumpReLUSAE):
    with torch.no_grad():
        matryoshka_sae.threshold[3] = torch.inf
    calibration = calibrate_threshold(matryoshka_sae, _batches(), 200, target_l0=20)  # more than can fire
    assert math.isfinite(calibration.shift)
    acts = matryoshka_sae.encode(torch.cat(_batches()))
    assert not acts[:, 3].any()
    assert (acts != 0).sum().item() / 200 == pytest.approx(calibration.l0_after)


def test_k_is_read_from_the_metadata_of_a_saved_sae():
    sae = MatryoshkaSAE.from_sae(MatryoshkaTrainingSAE(MatryoshkaTrainingSAEConfig(6, 20, k=3, matryoshka_widths=[20])))
    assert calibrate_threshold(sae, _batches(), 200).l0_after == 3


def test_unusable_arguments(matryoshka_sae: MatryoshkaJumpReLUSAE):
    before = copy.deepcopy(matryoshka_sae.state_dict())
    for arguments, message in [
        ({"target_l0": None}, "pass target_l0"),
        ({"target_l0": 0}, "target_l0=0 must be above 0"),
        ({"target_l0": 21}, "at most d_sae=20"),
        ({"target_l0": 2, "n_samples": 0}, "n_samples=0"),
    ]:
        with pytest.raises(ValueError, match=message):
            calibrate_threshold(matryoshka_sae, _batches(), **arguments)
    with pytest.raises(ValueError, match="no activations"):
        calibrate_threshold(matryoshka_sae, [], target_l0=2)
    with pytest.raises(ValueError, match="not finite"):
        calibrate_threshold(matryoshka_sae, [torch.full((3, 6), torch.nan)], target_l0=2)
    torch.testing.assert_close(matryoshka_sae.state_dict(), before)


def test_saes_without_thresholds_cannot_be_calibrated():
    sae = TopKSAE(TopKSAEConfig(6, 20, k=3))
    with pytest.raises(TypeError, match="A TopKSAE has no threshold to calibrate"):
        calibrate_threshold(sae, [torch.randn(10, 6)])  # type: ignore[arg-type]
