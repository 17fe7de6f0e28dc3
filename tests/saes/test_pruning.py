"""Leave-one-out pruning against its definition: leave a latent out, see what it would explain."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig, StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig

from sae_lens_matryoshka import MatryoshkaSAE, measure_pruning
from sae_lens_matryoshka.ops.pruning import leave_one_out_gains, leave_one_out_gains_reference

KINDS = {
    "jumprelu": (JumpReLUSAE, JumpReLUSAEConfig, {}),
    "standard": (StandardSAE, StandardSAEConfig, {}),
    "topk": (TopKSAE, TopKSAEConfig, {"k": 5}),
    "topk, by norm": (TopKSAE, TopKSAEConfig, {"k": 5, "rescale_acts_by_decoder_norm": True}),
}


def _sae(kind: str, seed: int = 0, **options: Any) -> MatryoshkaSAE:
    sae_class, config_class, fields = KINDS[kind]
    sae = sae_class(config_class(d_in=6, d_sae=20, dtype="float64", **fields, **options))
    generator = torch.Generator().manual_seed(seed)
    for parameter in sae.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return MatryoshkaSAE.from_sae(sae, [4, 10, 20])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 12), st.integers(1, 8), st.floats(0, 1), st.integers(0, 10**6))
def test_gains_are_those_of_leaving_each_latent_out(batch: int, width: int, d_in: int, density: float, seed: int):
    generator = torch.Generator().manual_seed(seed)
    target, W_dec, coefficients, mask = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((batch, d_in), (width, d_in), (batch, width), (batch, width))
    )
    W_dec[0] = 0
    coefficients = coefficients * (torch.special.ndtr(mask) < density)
    gains = leave_one_out_gains_reference(target, coefficients, W_dec)
    for latent in range(width):
        others = coefficients.clone()
        others[:, latent] = 0
        left, norm = target - others @ W_dec, W_dec[latent].norm()
        expected = left @ W_dec[latent] / norm if norm > 0 else torch.zeros(batch, dtype=torch.float64)
        torch.testing.assert_close(gains[:, latent], expected, rtol=1e-9, atol=1e-9)
    rows, columns, of_active = leave_one_out_gains(target, coefficients, W_dec)
    assert len(rows) == (coefficients != 0).sum()
    torch.testing.assert_close(of_active, gains[rows, columns], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("level", [0, 1, -1, None])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options", [{}, {"apply_b_dec_to_input": False}, {"normalize_activations": "layer_norm"}], ids=str
)
def test_exactly_the_latents_that_gain_too_little_are_left_out(kind: str, options: dict[str, Any], level: int | None):
    sae = _sae(kind, **options)
    x = torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    plain = sae.encode(x, level)
    processed = sae.process_sae_in(x)
    target = processed if sae.cfg.apply_b_dec_to_input else processed - sae.b_dec
    coefficients = sae._coefficients(plain)
    gains = leave_one_out_gains_reference(target, coefficients, sae.W_dec[: plain.shape[-1]])
    for threshold in (-1.0, 0.0, 0.7):
        pruned = sae.encode(x, level, prune_below=threshold)
        assert pruned.equal(plain * (gains > threshold))
    assert 0 < (sae.encode(x, level, prune_below=0.7) != 0).sum() < (plain != 0).sum()
    assert sae.encode(x, level, prune_below=float("-inf")).equal(plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_data_types(dtype: torch.dtype):
    sae = _sae("jumprelu").to(dtype)
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    pruned, plain = sae.encode(x, prune_below=0.5), sae.encode(x)
    assert pruned.dtype == dtype
    kept = pruned != 0
    assert 0 < kept.sum() < (plain != 0).sum()
    assert pruned[kept].equal(plain[kept])


@pytest.mark.parametrize("options", [{}, {"normalize_activations": "layer_norm"}], ids=str)
def test_measured_figures_are_those_of_pruned_encodings(options: dict[str, Any]):
    sae = _sae("jumprelu", **options)
    x = torch.randn(90, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    figures = measure_pruning(sae, [x[:50], x[50:]], [0.3, 1.0], level=1)
    assert [f.prune_below for f in figures] == [float("-inf"), 0.3, 1.0]
    for figure in figures:
        acts = sae.encode(x, 1, figure.prune_below)
        assert figure.l0 == pytest.approx((acts != 0).sum().item() / 90)
        unexplained = (sae.decode(acts, 1) - x).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
        assert figure.fvu == pytest.approx(unexplained.item(), rel=1e-6)


def test_nothing_to_measure_is_an_error():
    with pytest.raises(ValueError, match="no activations"):
        measure_pruning(_sae("jumprelu"), [], [0.1])
    with pytest.raises(ValueError, match="n_samples=0"):
        measure_pruning(_sae("jumprelu"), [], [0.1], n_samples=0)
    with pytest.raises(IndexError, match="level 3"):
        measure_pruning(_sae("jumprelu"), [torch.zeros(2, 6, dtype=torch.float64)], [0.1], level=3)
