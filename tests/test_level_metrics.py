"""Figures of levels against plain float64 PyTorch."""

from typing import Any

import pytest
import torch

from sae_lens_matryoshka import MatryoshkaJumpReLUSAE, MatryoshkaSAE, measure_levels
from sae_lens_matryoshka.measuring import level_metrics
from sae_lens_matryoshka.registration import TRAINING_CLASSES
from tests.largest_array import LargestArray


def test_figures_against_float64(matryoshka_sae: MatryoshkaJumpReLUSAE):
    batches = list(torch.randn(3, 50, 6, generator=torch.Generator().manual_seed(5)))
    matryoshka_sae.threshold.data[7] = 1e3  # never fires
    levels = measure_levels(matryoshka_sae, batches, n_samples=120)
    x = torch.cat(batches)[:120].double()
    sae = matryoshka_sae.double()
    hidden_pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    acts = hidden_pre.relu() * (hidden_pre > sae.threshold)
    for level, width in zip(levels, [1, 3, 8, 20], strict=True):
        residual = x - acts[:, :width] @ sae.W_dec[:width] - sae.b_dec
        fvu = residual.pow(2).sum() / (x - x.mean(0)).pow(2).sum()
        fvu_of_channels = residual.pow(2).sum(0) / (x - x.mean(0)).pow(2).sum(0)
        assert level.width == width
        assert level.fvu_standardized == pytest.approx(fvu_of_channels.mean().item(), rel=1e-4)
        assert level.dense == ((acts[:, :width] > 0).sum(0) > 12).sum().item()
        assert level.above_half == ((acts[:, :width] > 0).sum(0) > 60).sum().item()
        assert level.fvu == pytest.approx(fvu.item(), rel=1e-4)
        assert level.l0 == pytest.approx((acts[:, :width] > 0).sum().item() / 120)
        assert level.dead == (~(acts[:, :width] > 0).any(0)).sum().item()
    assert levels[2].dead >= 1


def test_no_channel_decides_the_figure_of_standardized_channels(matryoshka_sae: MatryoshkaJumpReLUSAE):
    """A channel with all of the variance, of a mean that rounds the others' squares away, and one that never varies."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(5000, 6, generator=generator)
    x[:, 2] = 5000 + 600 * torch.randn(5000, generator=generator)
    x[:, 4] = 3.7
    levels = measure_levels(matryoshka_sae, x.split(700), n_samples=5000)
    sae, x = matryoshka_sae.double(), x.double()
    for level, reconstruction in zip(levels, sae.reconstruct_levels(x), strict=True):
        shares = (x - reconstruction).pow(2).mean(0) / x.var(0, unbiased=False)
        expected = shares[[0, 1, 2, 3, 5]].mean().item()
        assert level.fvu_standardized == pytest.approx(expected, rel=1e-3)
        assert level.fvu != pytest.approx(expected, rel=0.1)


def test_the_stream_may_end_early_but_not_be_empty(matryoshka_sae: MatryoshkaJumpReLUSAE):
    assert len(measure_levels(matryoshka_sae, [torch.randn(10, 6)], n_samples=100)) == 4
    with pytest.raises(ValueError, match="no activations"):
        measure_levels(matryoshka_sae, [])


@pytest.mark.parametrize(("sae_class", "config_class"), TRAINING_CLASSES)
def test_blocks_give_the_same_and_bound_the_memory(sae_class: Any, config_class: Any, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    sae = MatryoshkaSAE.from_sae(sae_class(config_class(d_in=6, d_sae=500, matryoshka_widths=[20, 100, 500])))
    batches = [torch.randn(1000, 6) for _ in range(2)]
    whole = measure_levels(sae, batches)
    monkeypatch.setattr(level_metrics, "MOST_ACTIVATIONS", 500 * 70)
    with LargestArray() as largest:
        in_blocks = measure_levels(sae, batches)
    # the activations, and what levels reconstruct: never a whole batch of either
    assert largest.n_elements <= max(500 * 70, 3 * 70 * 6, 1000 * 6)
    for one, other in zip(whole, in_blocks, strict=True):
        assert (one.l0, one.dead) == (other.l0, other.dead)
        assert other.fvu == pytest.approx(one.fvu, rel=1e-5)
