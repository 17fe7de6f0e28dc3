"""Options that make better features: an encoder aligned with its decoder, and a k that falls."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sae_lens import SAE, LanguageModelSAERunnerConfig, LoggingConfig, SAETrainer, TrainingSAE
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

from sae_lens_matryoshka import MatryoshkaTrainingSAEConfig
from sae_lens_matryoshka.errors import ConfigError
from sae_lens_matryoshka.run_files.building import build_runner_configs, check_runner_config, sae_configs
from sae_lens_matryoshka.saes.aligned_encoder import align_encoder
from tests.saes.step_inputs import activations, train_step_input
from tests.tiny_runs import tiny_run, tiny_sae

VARIANTS = ["matryoshka", "matryoshka_topk", "matryoshka_jumprelu", "matryoshka_standard"]


def _sae(architecture: str, **options: Any) -> Any:
    torch.manual_seed(0)
    k = {"k": 3} if architecture in ("matryoshka", "matryoshka_topk") else {}
    sae_class, config_class = SAE_TRAINING_CLASS_REGISTRY[architecture]
    return sae_class(config_class(**{"d_in": 6, "d_sae": 24, "matryoshka_widths": [3, 8, 24], **k, **options}))


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 10**6))
def test_alignment_is_the_smallest_change_that_makes_inner_products_one(d_in: int, d_sae: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    W_enc = torch.randn(d_in, d_sae, generator=generator, dtype=torch.float64)
    W_dec = torch.randn(d_sae, d_in, generator=generator, dtype=torch.float64)
    aligned = W_enc.clone()
    align_encoder(aligned, W_dec)
    torch.testing.assert_close(torch.einsum("is,si->s", aligned, W_dec), torch.ones(d_sae).double())
    # the nearest point of a hyperplane: its normal is all that is added
    for latent in range(d_sae):
        unit = W_dec[latent] / W_dec[latent].norm()
        change = aligned[:, latent] - W_enc[:, latent]
        torch.testing.assert_close(change, (change @ unit) * unit, rtol=1e-9, atol=1e-9)
    again = aligned.clone()
    align_encoder(again, W_dec)
    torch.testing.assert_close(again, aligned)


def test_a_latent_without_a_decoder_direction_keeps_its_encoder():
    W_enc, W_dec = torch.randn(4, 2), torch.tensor([[0.0] * 4, [1.0, 0, 0, 0]])
    aligned = W_enc.clone()
    align_encoder(aligned, W_dec)
    assert aligned[:, 0].equal(W_enc[:, 0])
    assert aligned[0, 1] == 1


@pytest.mark.parametrize("architecture", VARIANTS)
def test_every_step_and_the_saved_sae_have_an_aligned_encoder(architecture: str, tmp_path: Path):
    sae = _sae(architecture, aligned_encoder=True, order_latents_by="firing_frequency")
    trainer = SAETrainer(SAETrainerConfig(20 * 32, 32, lr=1e-2, lr_end=1e-2), sae, iter(()))
    inner: list[torch.Tensor] = []
    forward = sae.training_forward_pass

    def watched(step_input: Any) -> Any:
        output = forward(step_input)
        inner.append(torch.einsum("is,si->s", sae.W_enc, sae.W_dec).detach().clone())
        return output

    sae.training_forward_pass = watched
    for step in range(5):
        trainer.step(activations(32, 6, step))
    torch.testing.assert_close(torch.stack(inner), torch.ones(5, 24))
    assert (torch.einsum("is,si->s", sae.W_enc, sae.W_dec) - 1).abs().max() > 1e-4  # the last step has moved it
    before = sae.W_enc.detach().clone()
    sae.save_inference_model(tmp_path)
    assert sae.W_enc.equal(before)
    saved = SAE.load_from_disk(tmp_path)
    products = torch.einsum("is,si->s", saved.W_enc, saved.W_dec)
    norms = 1.0 if architecture != "matryoshka" else products / products  # folding scales both by the norm and back
    torch.testing.assert_close(products, torch.ones(24) * norms)


@given(st.floats(1, 20), st.floats(0.5, 30), st.integers(1, 50), st.integers(0, 80))
def test_k_falls_linearly_and_stays(k: float, more: float, n_steps: int, step: int):
    cfg = MatryoshkaTrainingSAEConfig(6, 64, k=k, k_start=k + more, k_anneal_steps=n_steps, matryoshka_widths=[8, 64])
    expected = k + more * (1 - step / n_steps) if step < n_steps else k
    assert cfg.k_at(step) == pytest.approx(expected)
    assert (cfg.k_at(0), cfg.k_at(n_steps)) == (k + more, pytest.approx(k))


@pytest.mark.parametrize("by_definition", [False, True])
@pytest.mark.parametrize("architecture", ["matryoshka", "matryoshka_topk"])
def test_as_many_latents_fire_as_the_step_says(architecture: str, by_definition: bool):
    sae = _sae(architecture, k_start=9, k_anneal_steps=10)
    with torch.no_grad():
        sae.b_enc += 3  # enough latents are positive
    if by_definition:
        sae.hook_sae_acts_post.add_hook(lambda tensor, hook: tensor)
    for step, expected in ((0, 9), (5, 6), (7, 4.8), (10, 3), (12, 3)):
        output = sae.training_forward_pass(train_step_input(activations(20, 6, step), step=step))
        expected = expected if architecture == "matryoshka" else round(expected)
        assert output.feature_acts.to_dense().bool().sum() == int(expected * 20)
        assert output.metrics["k"] == pytest.approx(expected)


def test_k_falls_over_the_whole_run_unless_it_is_said_how_long(tinystories: Path):
    sae = {**tiny_sae(), "k_start": 20}
    cfg = build_runner_configs(tiny_run(tinystories, None, sae=sae))
    assert sae_configs(cfg)["sae"].k_anneal_steps == 60  # type: ignore[arg-type, union-attr]
    cfg = build_runner_configs(tiny_run(tinystories, None, sae={**sae, "k_anneal_steps": 5}))
    assert sae_configs(cfg)["sae"].k_anneal_steps == 5  # type: ignore[arg-type, union-attr]
    with pytest.raises(ConfigError, match=r"sae\.k_anneal_steps=61 take more than the 60 steps of this run"):
        build_runner_configs(tiny_run(tinystories, None, sae={**sae, "k_anneal_steps": 61}))
    with pytest.raises(ConfigError, match=r"sae\.k_start=20 with compile_sae=true would compile every step anew"):
        build_runner_configs(tiny_run(tinystories, None, sae=sae, compile_sae=True))


def test_k_of_a_config_from_python_falls_over_its_run():
    sae = MatryoshkaTrainingSAEConfig(64, 128, k=4, k_start=9, matryoshka_widths=[16, 128])
    cfg = LanguageModelSAERunnerConfig(
        sae,
        training_tokens=4096 * 7,
        train_batch_size_tokens=4096,
        n_batches_in_buffer=64,
        dataset_path="some/text",
        logger=LoggingConfig(log_to_wandb=False),
    )
    check_runner_config(cfg)
    assert sae.k_anneal_steps == 7


def test_under_another_runner_it_must_be_said_how_long_k_falls():
    sae = _sae("matryoshka", k_start=9)
    with pytest.raises(ValueError, match="k_start=9 under a runner that is not this plugin's: set k_anneal_steps"):
        sae.training_forward_pass(train_step_input(activations(20, 6, 0)))


@pytest.mark.parametrize("old", ["order_latents_by_contribution", "latent_contribution_lr"])
def test_fields_of_earlier_versions_are_told_their_new_names(tinystories: Path, old: str):
    value: Any = True if old.startswith("order") else 0.1
    with pytest.raises(ConfigError, match=rf"sae\.{old} is called sae\.(order_latents_by|latent_order_lr).* now"):
        build_runner_configs(tiny_run(tinystories, None, sae={**tiny_sae(), old: value}))
    checkpoint = {**_sae("matryoshka").cfg.to_dict(), old: value}
    with pytest.raises(ValueError, match=f"{old}=.* is called (order_latents_by|latent_order_lr)"):
        TrainingSAE.from_dict(checkpoint)
    TrainingSAE.from_dict({**checkpoint, old: False})
