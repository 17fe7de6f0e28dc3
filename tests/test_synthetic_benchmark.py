"""The scores against dictionaries whose scores are known: the true features, and features absorbed by hand."""

from pathlib import Path

import pytest
import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.synthetic import ConstantFiringProbabilityConfig, HierarchyConfig, SyntheticModel, SyntheticModelConfig

from sae_lens_matryoshka.measuring.synthetic_scores import (
    SyntheticScores,
    parents_and_children,
    plot_scores,
    score_on_synthetic_model,
)

N_PARENTS, N_CHILDREN = 3, 2
N_FEATURES = N_PARENTS * (1 + N_CHILDREN)


@pytest.fixture(scope="module")
def synthetic_model() -> SyntheticModel:
    """Orthogonal features, so that the true dictionary reads every feature exactly."""
    model = SyntheticModel(
        SyntheticModelConfig(
            num_features=N_FEATURES,
            hidden_dim=N_FEATURES,
            firing_probability=ConstantFiringProbabilityConfig(0.4),
            hierarchy=HierarchyConfig(N_PARENTS, N_CHILDREN, max_depth=1),
            bias=False,
            seed=0,
        )
    )
    model.feature_dict.feature_vectors.data = torch.eye(N_FEATURES)
    return model


def _sae(W_enc: torch.Tensor, W_dec: torch.Tensor) -> JumpReLUSAE:
    sae = JumpReLUSAE(JumpReLUSAEConfig(N_FEATURES, W_dec.shape[0]))
    sae.W_enc.data, sae.W_dec.data = W_enc, W_dec
    sae.threshold.data += 0.5
    return sae


def test_the_hierarchy_is_read(synthetic_model: SyntheticModel):
    assert dict(parents_and_children(synthetic_model)) == {0: [3, 4], 1: [5, 6], 2: [7, 8]}


def test_the_true_dictionary_is_perfect(synthetic_model: SyntheticModel):
    sae = _sae(torch.eye(N_FEATURES), torch.eye(N_FEATURES))
    scores = score_on_synthetic_model(sae, synthetic_model, 2000, n_smallest=N_PARENTS)
    assert scores.mcc == pytest.approx(1, abs=1e-5)
    assert scores.f1 == pytest.approx(1, abs=1e-5)
    assert scores.explained_variance == pytest.approx(1, abs=1e-5)
    assert scores.parent_recovery == 1  # parents fire most often, so they are the smallest level
    assert scores.absorption == 0
    assert (scores.precision, scores.recall) == pytest.approx((1, 1), abs=1e-5)
    assert (scores.uniqueness, scores.dead) == (1, 0)
    assert scores.l0 == pytest.approx(N_PARENTS * (0.4 + N_CHILDREN * 0.4 * 0.4), rel=0.1)


def test_a_parent_written_into_its_children_is_absorbed(synthetic_model: SyntheticModel):
    W_enc, W_dec = torch.eye(N_FEATURES), torch.eye(N_FEATURES)
    # the latent of parent 0 is silenced by either child, whose latents write the parent as well
    W_enc[[3, 4], 0] = -5.0
    W_dec[[3, 4], 0] = 0.5
    scores = score_on_synthetic_model(_sae(W_enc, W_dec), synthetic_model, 20_000, n_smallest=N_PARENTS)
    # one of three parents, wherever at least one of its two children fires with it
    assert scores.absorption == pytest.approx((1 - 0.6**2) / 3, abs=0.02)


def test_the_smallest_level_is_where_parents_are_looked_for(synthetic_model: SyntheticModel):
    order = [8, 7, 6, 0, 1, 2, 3, 4, 5]
    sae = _sae(torch.eye(N_FEATURES)[:, order], torch.eye(N_FEATURES)[order])
    sae.cfg.metadata.matryoshka_widths = [5, N_FEATURES]
    assert score_on_synthetic_model(sae, synthetic_model, 500).parent_recovery == pytest.approx(2 / 3)


def test_the_plot_is_written(tmp_path: Path):
    finding = {"precision": 0.8, "recall": 0.8, "uniqueness": 1, "dead": 0}
    scores = SyntheticScores(
        mcc=0.9, f1=0.8, explained_variance=0.7, l0=3, parent_recovery=1, absorption=0.1, **finding
    )
    plot_scores({"one": scores, "two": scores}, tmp_path / "scores.png")
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")
