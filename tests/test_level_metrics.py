"""Figures of levels against plain float64 PyTorch."""

import pytest
import torch

from sae_lens_matryoshka import MatryoshkaJumpReLUSAE, measure_levels


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
        assert level.width == width
        assert level.fvu == pytest.approx(fvu.item(), rel=1e-4)
        assert level.l0 == pytest.approx((acts[:, :width] > 0).sum().item() / 120)
        assert level.dead == (~(acts[:, :width] > 0).any(0)).sum().item()
    assert levels[2].dead >= 1


def test_the_stream_may_end_early_but_not_be_empty(matryoshka_sae: MatryoshkaJumpReLUSAE):
    assert len(measure_levels(matryoshka_sae, [torch.randn(10, 6)], n_samples=100)) == 4
    with pytest.raises(ValueError, match="no activations"):
        measure_levels(matryoshka_sae, [])
