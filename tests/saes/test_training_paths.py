"""The fast training step against SAELens's own class by autograd, and when the dense one is taken instead."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import (
    LoggingConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
    SAETrainer,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor

from sae_lens_matryoshka import MatryoshkaSAE, MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig
from tests.saes.step_inputs import activations, dead_mask, train_step_input

WIDTHS = st.lists(st.integers(1, 40), min_size=1, max_size=12, unique=True).map(sorted)
NORMALIZED = ("layer_norm", "constant_norm_rescale")


def _pair(seed: int, **cfg: Any) -> tuple[MatryoshkaTrainingSAE, MatryoshkaBatchTopKTrainingSAE]:
    """Ours and SAELens's with the same random parameters."""
    ours = MatryoshkaTrainingSAE(MatryoshkaTrainingSAEConfig(**cfg))
    cfg.pop("level_weights", None)
    theirs = MatryoshkaBatchTopKTrainingSAE(MatryoshkaBatchTopKTrainingSAEConfig(**cfg))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for (name, ours_parameter), theirs_parameter in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            values = torch.randn(ours_parameter.shape, generator=generator) * (1.0 if "W" in name else 0.1)
            ours_parameter.copy_(values)
            theirs_parameter.copy_(values)
    return ours, theirs


def _step_input(batch: int, d_in: int, dead: list[int], d_sae: int, seed: int, dtype: torch.dtype) -> TrainStepInput:
    return train_step_input(activations(batch, d_in, seed).to(dtype), dead_mask(dead, d_sae))


def _assert_same_step(
    ours: MatryoshkaTrainingSAE,
    theirs: MatryoshkaBatchTopKTrainingSAE,
    step_input: TrainStepInput,
    rtol: float,
    level_weights: list[float] | None = None,
    run: Callable[[Callable[[], TrainStepOutput]], TrainStepOutput] = lambda step: step(),
):
    our_output = run(lambda: ours.training_forward_pass(step_input))
    their_output = run(lambda: theirs.training_forward_pass(step_input))
    assert our_output.feature_acts.is_sparse  # else the dense path was compared with itself
    expected_loss = their_output.loss
    if level_weights is not None:
        widths, d_sae = ours.cfg.matryoshka_widths, ours.cfg.d_sae
        for weight, width in zip(level_weights, widths, strict=True):
            name = "mse_loss" if width == d_sae else f"inner_mse_loss_{width}"
            expected_loss = expected_loss + (weight - 1) * their_output.losses[name]
    assert list(our_output.losses) == list(their_output.losses)
    scale = expected_loss.item()
    for name, loss in their_output.losses.items():
        torch.testing.assert_close(our_output.losses[name], loss, rtol=rtol, atol=rtol * scale, check_dtype=False)
    torch.testing.assert_close(our_output.loss, expected_loss, rtol=rtol, atol=0, check_dtype=False)
    for first, second in (
        (our_output.feature_acts.to_dense(), their_output.feature_acts),
        (our_output.sae_out, their_output.sae_out),
    ):
        assert (first - second).norm() / second.norm().clamp(min=1e-30) < rtol
    our_output.loss.backward()
    expected_loss.backward()
    for (name, parameter), reference in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert parameter.grad is not None
        assert reference.grad is not None
        error = (parameter.grad - reference.grad).norm() / reference.grad.norm().clamp(min=1e-30)
        assert error < rtol, f"{name}: relative error {error:.2e}"


@settings(max_examples=80, deadline=None)
@given(
    widths=WIDTHS,
    batch=st.integers(2, 20),
    k_share=st.floats(0.02, 0.9),
    dead_share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    rescale=st.booleans(),
    apply_b_dec=st.booleans(),
    matryoshka_aux=st.booleans(),
    weighted=st.booleans(),
    normalize=st.sampled_from(["none", "expected_average_only_in", "covariance_whitening"]),
    reshape=st.sampled_from(["none", "hook_z"]),
    seed=st.integers(0, 10**6),
)
def test_every_loss_and_gradient_in_float64(
    widths: list[int],
    batch: int,
    k_share: float,
    dead_share: float,
    rescale: bool,
    apply_b_dec: bool,
    matryoshka_aux: bool,
    weighted: bool,
    normalize: str,
    reshape: str,
    seed: int,
):
    d_sae = widths[-1]
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(len(widths), generator=generator).add(0.1).tolist() if weighted else None
    ours, theirs = _pair(
        seed,
        d_in=6,
        d_sae=d_sae,
        k=max(0.3, k_share * d_sae),
        matryoshka_widths=widths,
        level_weights=weights,
        rescale_acts_by_decoder_norm=rescale,
        apply_b_dec_to_input=apply_b_dec,
        use_matryoshka_aux_loss=matryoshka_aux,
        normalize_activations=normalize,
        reshape_activations=reshape,
        dtype="float64",
    )
    dead = torch.randperm(d_sae, generator=generator)[: int(dead_share * d_sae)].tolist()
    step_input = _step_input(batch, 6, dead, d_sae, seed + 1, torch.float64)
    _assert_same_step(ours, theirs, step_input, 1e-9, weights)


@pytest.mark.parametrize("dead", [[], [3, 100, 101, 250]])
def test_float32(dead: list[int]):
    ours, theirs = _pair(0, d_in=32, d_sae=256, k=8.5, matryoshka_widths=[16, 64, 256])
    _assert_same_step(ours, theirs, _step_input(128, 32, dead, 256, 1, torch.float32), 1e-5)


def test_bfloat16_autocast():
    ours, theirs = _pair(0, d_in=32, d_sae=256, k=8, matryoshka_widths=[16, 64, 256])

    def autocast(step: Callable[[], TrainStepOutput]) -> TrainStepOutput:
        with torch.autocast("cpu", torch.bfloat16):
            return step()

    _assert_same_step(ours, theirs, _step_input(128, 32, [1, 2], 256, 1, torch.float32), 2e-2, run=autocast)


@pytest.mark.parametrize("matryoshka_aux", [False, True])
@pytest.mark.parametrize("normalize", NORMALIZED)
def test_normalizations_of_each_sample_against_a_float64_reference(normalize: Any, matryoshka_aux: bool):
    """SAELens's own Matryoshka class cannot train here, so both of our paths are held against plain autograd."""
    widths = [4, 12, 40]
    ours, _ = _pair(
        2,
        d_in=6,
        d_sae=40,
        k=5,
        matryoshka_widths=widths,
        normalize_activations=normalize,
        use_matryoshka_aux_loss=matryoshka_aux,
        dtype="float64",
    )
    step_input = _step_input(16, 6, [1, 20, 21], 40, 3, torch.float64)
    x = step_input.sae_in
    if normalize == "layer_norm":
        mean = x.mean(-1, keepdim=True)
        scale = (x - mean).std(-1, keepdim=True)
        normalized = (x - mean) / (scale + 1e-5)
    else:
        mean = torch.zeros(16, 1, dtype=torch.float64)
        scale = x.norm(dim=-1, keepdim=True) / 6**0.5
        normalized = x / scale
    norms = ours.W_dec.norm(dim=-1)
    hidden_pre = (normalized - ours.b_dec) @ ours.W_enc + ours.b_enc
    scores = (hidden_pre * norms).relu()
    mask = scores >= scores.flatten().topk(5 * 16).values.min()
    losses: list[Tensor] = []
    auxiliary = torch.zeros((), dtype=torch.float64)
    narrower = 0
    for width in widths:
        out = ((hidden_pre * mask)[:, :width] @ ours.W_dec[:width] + ours.b_dec) * scale + mean
        losses.append((out - x).pow(2).sum(-1).mean())
        dead = [i for i in (1, 20, 21) if (narrower if matryoshka_aux else 0) <= i < width]
        if dead and (matryoshka_aux or width == 40):
            recons = hidden_pre[:, dead] @ ours.W_dec[dead] * scale  # at most d_in // 2 = 3 dead: all are used
            auxiliary = auxiliary + len(dead) / 3 * (recons - (x - out).detach()).pow(2).sum(-1).mean()
        narrower = width
    expected = torch.stack(losses).sum() + auxiliary
    expected_gradients = torch.autograd.grad(expected, list(ours.parameters()))

    for hooked in (False, True):
        if hooked:
            ours.hook_sae_acts_post.add_hook(lambda tensor, hook: tensor)
        assert ours.training_path.fast is not hooked
        output = ours.training_forward_pass(step_input)
        torch.testing.assert_close(output.loss, expected, rtol=1e-9, atol=0)
        torch.testing.assert_close(output.losses["auxiliary_reconstruction_loss"], auxiliary, rtol=1e-9, atol=0)
        gradients = torch.autograd.grad(output.loss, list(ours.parameters()))
        for ours_gradient, reference in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(ours_gradient, reference, rtol=1e-9, atol=1e-11)


def test_three_hundred_steps_stay_with_saelens():
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(100, 32, generator=generator)
    cfg: dict[str, Any] = {"d_in": 32, "d_sae": 256, "k": 6, "matryoshka_widths": [16, 64, 256]}
    torch.manual_seed(0)
    ours = MatryoshkaTrainingSAE(MatryoshkaTrainingSAEConfig(**cfg))
    torch.manual_seed(0)
    theirs = MatryoshkaBatchTopKTrainingSAE(MatryoshkaBatchTopKTrainingSAEConfig(**cfg))
    trainer_cfg = SAETrainerConfig(300 * 256, 256, lr=1e-3, lr_end=1e-3, dead_feature_window=50)
    trainers = [SAETrainer(trainer_cfg, sae, iter(())) for sae in (ours, theirs)]
    assert ours.training_path.fast
    for step in range(300):
        coefficients = torch.rand(256, 100, generator=generator)
        batch = (coefficients * (coefficients > 0.93)) @ directions
        if step == 150:
            batch = batch * 10  # the guess from the last step is far off
        outputs = [trainer.step(batch) for trainer in trainers]
        for trainer in trainers:
            trainer.n_training_steps += 1
        torch.testing.assert_close(outputs[0].loss, outputs[1].loss, rtol=1e-3, atol=0)
        smallest = outputs[0].feature_acts.values().min()
        their_acts = outputs[1].feature_acts
        torch.testing.assert_close(smallest, their_acts[their_acts > 0].min(), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(trainers[0].act_freq_scores, trainers[1].act_freq_scores, rtol=0.05, atol=20)
    assert trainers[0].dead_neurons.sum() == pytest.approx(trainers[1].dead_neurons.sum().item(), abs=3)


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("normalize", ["expected_average_only_in", "covariance_whitening"])
def test_normalizations_of_the_data_set_are_folded_as_in_saelens(normalize: str, rescale: bool):
    cfg: dict[str, Any] = {"d_in": 8, "d_sae": 40, "k": 4, "matryoshka_widths": [8, 40], "dtype": "float64"}
    ours, theirs = _pair(0, **cfg, normalize_activations=normalize, rescale_acts_by_decoder_norm=rescale)
    trainer_cfg = SAETrainerConfig(30 * 64, 64, lr=1e-3, lr_end=1e-3, n_batches_for_norm_estimate=10)
    for sae in (ours, theirs):
        generator = torch.Generator().manual_seed(1)
        data = iter([torch.randn(64, 8, generator=generator, dtype=torch.float64) * 5 + 3 for _ in range(40)])
        SAETrainer(trainer_cfg, sae, data).fit()
    assert ours.cfg.normalize_activations == "none"
    x = torch.randn(50, 8, dtype=torch.float64) * 5 + 3
    theirs.topk_threshold = ours.topk_threshold  # only the threshold is meant to differ
    expected = MatryoshkaSAE.from_sae(theirs)(x)
    torch.testing.assert_close(MatryoshkaSAE.from_sae(ours)(x), expected, rtol=1e-4, atol=1e-4)


def test_hooks_see_the_dense_tensors_that_saelens_shows():
    ours, theirs = _pair(0, d_in=6, d_sae=20, k=3, matryoshka_widths=[5, 20])
    assert ours.training_path.fast
    step_input = _step_input(9, 6, [], 20, 1, torch.float32)
    names = ["hook_sae_input", "hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_recons"]
    seen: list[dict[str, Tensor]] = [{}, {}]
    for sae, record in zip((ours, theirs), seen, strict=True):

        def remember(tensor: Tensor, hook: Any, record: dict[str, Tensor] = record) -> None:
            record[hook.name] = tensor.detach().clone()

        with sae.hooks(fwd_hooks=[(name, remember) for name in names]):
            if sae is ours:
                assert not ours.training_path.fast
                assert "hook_sae_acts_pre" in ours.training_path.reason
            output = sae.training_forward_pass(step_input)
            assert not output.feature_acts.is_sparse
    assert seen[0].keys() == seen[1].keys() == set(names)
    for name in names:
        torch.testing.assert_close(seen[0][name], seen[1][name])
    assert ours.training_path.fast  # again, once the hooks are gone


def test_other_reasons_for_the_dense_path():
    cfg: dict[str, Any] = {"d_in": 6, "d_sae": 20, "k": 3, "matryoshka_widths": [5, 20]}
    half = MatryoshkaTrainingSAE(MatryoshkaTrainingSAEConfig(**cfg, dtype="bfloat16"))
    assert "bfloat16" in half.training_path.reason
    output = half.training_forward_pass(_step_input(9, 6, [], 20, 1, torch.bfloat16))
    output.loss.backward()
    assert not output.feature_acts.is_sparse
    replaced = MatryoshkaTrainingSAE(MatryoshkaTrainingSAEConfig(**cfg))
    replaced.mse_loss_fn = lambda preds, target: (preds - target).abs()
    assert "mse_loss_fn" in replaced.training_path.reason
    assert not replaced.training_forward_pass(_step_input(9, 6, [], 20, 1, torch.float32)).feature_acts.is_sparse
    plain = MatryoshkaTrainingSAE(MatryoshkaTrainingSAEConfig(**cfg))
    step_input = _step_input(9, 6, [], 20, 1, torch.float32)
    step_input.sae_in.requires_grad_()
    plain.training_forward_pass(step_input).loss.backward()
    assert step_input.sae_in.grad is not None


def test_a_compiled_step_has_the_same_loss():
    ours, theirs = _pair(0, d_in=6, d_sae=20, k=3, matryoshka_widths=[5, 20])
    step_input = _step_input(9, 6, [], 20, 1, torch.float32)
    compiled = torch.compile(ours.training_forward_pass, backend="aot_eager")
    output = compiled(step_input)
    torch.testing.assert_close(output.loss, theirs.training_forward_pass(step_input).loss, rtol=1e-5, atol=0)
    output.loss.backward()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_input_that_is_not_finite_stops_the_step_with_everything_untouched(bad: float):
    ours, _ = _pair(0, d_in=6, d_sae=20, k=3, matryoshka_widths=[5, 20])
    ours.training_forward_pass(_step_input(9, 6, [], 20, 1, torch.float32))
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    step_input = _step_input(9, 6, [], 20, 1, torch.float32)
    step_input.sae_in[2, 3] = bad
    step_input.n_training_steps = 7
    with pytest.raises(ValueError, match="Training step 7: the input activations hold 1 values that are not finite"):
        ours.training_forward_pass(step_input)
    torch.testing.assert_close(ours.state_dict(), before)


def test_a_loss_that_overflows_stops_the_step_with_everything_untouched():
    ours, _ = _pair(0, d_in=6, d_sae=20, k=3, matryoshka_widths=[5, 20])
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    step_input = _step_input(9, 6, [], 20, 1, torch.float32)
    step_input.sae_in *= 1e30
    with pytest.raises(ValueError, match=r"Training step 0: the loss is inf; the input's largest absolute value is"):
        ours.training_forward_pass(step_input)
    torch.testing.assert_close(ours.state_dict(), before)


def test_the_encoder_is_kept_by_column_but_saved_as_saelens_saves_it(tmp_path: Any):
    ours, theirs = _pair(0, d_in=6, d_sae=20, k=3, matryoshka_widths=[5, 20])
    ours.training_forward_pass(_step_input(9, 6, [], 20, 1, torch.float32))
    assert ours.W_enc.t().is_contiguous()
    assert ours.W_enc.shape == theirs.W_enc.shape
    ours.save_model(tmp_path / "checkpoint")
    ours.save_inference_model(tmp_path / "saved")


def test_the_trainer_of_several_saes_takes_sparse_activations():
    from sae_lens.training.multi_sae_trainer import MultiSAETrainer

    cfg: dict[str, Any] = {"d_in": 6, "d_sae": 20, "matryoshka_widths": [5, 20]}
    saes = {f"k{k}": MatryoshkaTrainingSAE(MatryoshkaTrainingSAEConfig(**cfg, k=k)) for k in (2, 4)}
    generator = torch.Generator().manual_seed(0)
    data = ({"hook": torch.randn(50, 6, generator=generator)} for _ in range(20))
    trainer_cfg = SAETrainerConfig(1000, 50, lr_end=3e-4, logger=LoggingConfig(log_to_wandb=False))
    MultiSAETrainer(trainer_cfg, dict(saes), dict.fromkeys(saes, "hook"), data).fit()
    assert all(sae.topk_threshold_updates == 20 for sae in saes.values())
