"""The random baseline has the shape and, at every level, the L0 of the SAE, and nothing that was learned."""

import dataclasses

import pytest
import torch
from sae_lens import JumpReLUSAE, TopKSAE, TopKSAEConfig

from sae_lens_matryoshka import MatryoshkaJumpReLUSAE, MatryoshkaSAE
from sae_lens_matryoshka.bench.activation_source import ActivationSource
from sae_lens_matryoshka.bench.evaluated_saes import hook_of, levels
from sae_lens_matryoshka.bench.random_baseline import calibration_activations, random_baseline, random_baselines
from tests.conftest import random_matryoshka_sae


def _activations(n: int = 2000) -> torch.Tensor:
    """As of a real model: one channel with most of the variance, one that never varies."""
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(0)) @ torch.randn(
        6, 6, generator=torch.Generator().manual_seed(1)
    )
    x[:, 0] = 40 * x[:, 0] + 300
    x[:, 5] = 7
    return x


def test_every_level_has_the_l0_of_the_sae_and_explains_more_than_the_one_before():
    sae, x = random_matryoshka_sae([8, 20, 64]), _activations()
    baseline = random_baseline(sae, x, 0)
    assert isinstance(baseline, MatryoshkaJumpReLUSAE)
    assert baseline.widths == sae.widths
    for level in range(3):
        l0, wanted = ((of.encode(x, level) > 0).sum(dim=-1).float().mean() for of in (baseline, sae))
        assert l0 == pytest.approx(float(wanted), abs=0.01)
    unexplained = (baseline.reconstruct_levels(x) - x).square().sum(dim=(1, 2)) / (x - x.mean(dim=0)).square().sum()
    assert 1 > unexplained[0] >= unexplained[1] >= unexplained[2] > 0


def test_the_directions_are_random_where_every_channel_has_variance_1():
    sae, x = random_matryoshka_sae([8, 20, 64]), _activations()
    baseline, again, other = (random_baseline(sae, x, seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(baseline.parameters(), again.parameters(), strict=True))
    assert not torch.equal(baseline.W_enc, other.W_enc)
    directions = torch.nn.functional.normalize(baseline.W_dec / x.std(dim=0).where(x.std(dim=0) > 0, torch.inf), dim=1)
    encoder = torch.nn.functional.normalize(baseline.W_enc.T * x.std(dim=0), dim=1)
    torch.testing.assert_close(directions[:, :5], encoder[:, :5])
    assert abs(float(directions[:, 0].square().mean()) - 1 / 5) < 0.1  # the largest channel owns no latent
    torch.testing.assert_close(baseline.b_dec, x.mean(dim=0))


def test_saes_without_levels_and_with_another_activation():
    sae = TopKSAE(TopKSAEConfig(6, 32, k=5))
    with torch.no_grad():
        sae.W_enc.normal_()
    x = _activations()
    baseline = random_baseline(sae, x, 0)
    assert isinstance(baseline, JumpReLUSAE)
    assert not isinstance(baseline, MatryoshkaSAE)
    assert (baseline.encode(x) > 0).sum(dim=-1).float().mean() == pytest.approx(
        float((sae.encode(x) != 0).sum(dim=-1).float().mean()), abs=0.01
    )


def test_what_is_evaluated_beside_an_sae(sae: MatryoshkaSAE, source: ActivationSource):
    evaluated = levels("ours", sae, [0, -1])
    hook = hook_of(sae)
    baselines = random_baselines(evaluated, hook, source)
    assert [(str(b), b.width) for b in baselines] == [("ours_random level 0", 16), ("ours_random level 2", 128)]
    assert baselines[0].sae is baselines[1].sae
    assert hook_of(baselines[0].sae) == hook
    assert [b.hash for b in baselines] == [b.hash for b in random_baselines(evaluated, hook, source)]
    x = calibration_activations(hook, source)
    assert len(x) > 1000
    assert dataclasses.replace(baselines[0], level=1).cut_out.W_dec.shape == (48, 64)
