"""Every variant against its SAELens one-level twin, and the fast step against the definition with every option."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import SAE
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput

from sae_lens_matryoshka import MatryoshkaSAE
from sae_lens_matryoshka.saes import thresholded_family
from sae_lens_matryoshka.saes.thresholded_family import ThresholdedTrainingSAE
from tests.saes.step_inputs import train_step_input

TWINS = {
    "matryoshka": "batchtopk",
    "matryoshka_topk": "topk",
    "matryoshka_jumprelu": "jumprelu",
    "matryoshka_standard": "standard",
}
"""Our architectures and what they are with a single level."""

D_IN = 6
WIDTHS = st.lists(st.integers(1, 30), min_size=1, max_size=6, unique=True).map(sorted)
COEFFICIENTS = {"l0": 0.7, "l1": 0.3}


@st.composite
def _twin_options(draw: st.DrawFn, architecture: str) -> dict[str, Any]:
    """Config fields that a variant shares with its twin."""
    options: dict[str, Any] = {"apply_b_dec_to_input": draw(st.booleans())}
    if architecture in ("matryoshka", "matryoshka_topk"):
        options["rescale_acts_by_decoder_norm"] = draw(st.booleans())
        options["k"] = draw(st.integers(1, 4))
    if architecture == "matryoshka_jumprelu":
        options["jumprelu_sparsity_loss_mode"] = draw(st.sampled_from(["step", "tanh", "quadratic"]))
        options["jumprelu_ste_to_input"] = draw(st.booleans())
        options["jumprelu_bandwidth"] = draw(st.sampled_from([0.05, 1.0, 3.0]))
        options["target_l0"] = 1.0
        options["pre_act_loss_coefficient"] = draw(st.sampled_from([None, 0.2]))
    if architecture == "matryoshka_standard":
        options["lp_norm"] = draw(st.sampled_from([1.0, 1.0, 2.0]))
    return options


def _make(architecture: str, seed: int = 0, **cfg: Any) -> Any:
    """A training SAE with random parameters, the same for a variant and its twin."""
    sae_class, config_class = SAE_TRAINING_CLASS_REGISTRY[architecture]
    sae = sae_class(config_class(**cfg))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(sae.named_parameters()):
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if name == "threshold":  # SAELens keeps it in float32, whose rounding would hide errors
                parameter.data = values.abs().to(sae.dtype)
            else:
                parameter.copy_(values if name.startswith("W") else 0.3 * values)
    return sae


def _step_input(batch: int, d_sae: int, seed: int, dtype: torch.dtype = torch.float64, step: int = 0) -> TrainStepInput:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, D_IN, generator=generator, dtype=torch.float64).to(dtype)
    dead = torch.rand(d_sae, generator=generator) < 0.2
    return train_step_input(x, dead, COEFFICIENTS, step)


def _list_few(sae: Any, listed: bool):
    """Make a thresholded variant list what matters, or use whole matrices, whatever the share."""
    if isinstance(sae, ThresholdedTrainingSAE):
        sae.share_that_matters.fill_(0.0 if listed else 1.0)


def _is_listed(sae: Any, listed: bool) -> bool:
    """Whether the step works from listed entries: always if latents are selected, never with another norm than L1."""
    return not isinstance(sae, ThresholdedTrainingSAE) or (listed and getattr(sae.cfg, "lp_norm", 1) == 1)


@pytest.fixture(autouse=True)
def _any_share_may_be_listed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(thresholded_family, "LISTED_SHARE", 0.5)


def _assert_same_step(
    ours: Any,
    our_output: TrainStepOutput,
    theirs: Any,
    their_output: TrainStepOutput,
    **tol: Any,
):
    rtol = tol.get("rtol", 1e-9)
    torch.testing.assert_close(our_output.loss, their_output.loss, rtol=rtol, atol=1e-12, check_dtype=False)
    for name, loss in their_output.losses.items():
        torch.testing.assert_close(our_output.losses[name], loss, rtol=rtol, atol=1e-12, check_dtype=False)
    for attribute in ("feature_acts", "sae_out"):
        first, second = getattr(our_output, attribute), getattr(their_output, attribute)
        torch.testing.assert_close(first.to_dense(), second.to_dense(), rtol=rtol, atol=1e-9)
    gradients = []
    for sae, output in ((ours, our_output), (theirs, their_output)):
        sae.zero_grad()
        output.loss.backward()
        gradients.append({name: parameter.grad for name, parameter in sae.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[1].items():
        gradient = gradients[0][name]
        expected = torch.zeros_like(theirs.get_parameter(name)) if expected is None else expected
        gradient = torch.zeros_like(expected) if gradient is None else gradient
        torch.testing.assert_close(gradient, expected, rtol=rtol, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.filterwarnings("ignore:.*single level.*", "ignore:.*only set one matryoshka level.*")
@pytest.mark.parametrize("architecture", TWINS)
@settings(max_examples=40, deadline=None)
@given(
    data=st.data(), d_sae=st.integers(4, 30), batch=st.integers(1, 9), listed=st.booleans(), seed=st.integers(0, 10**6)
)
def test_with_one_level_a_variant_is_its_twin(
    architecture: str, data: st.DataObject, d_sae: int, batch: int, listed: bool, seed: int
):
    cfg = {"d_in": D_IN, "d_sae": d_sae, "dtype": "float64", **data.draw(_twin_options(architecture))}
    ours = _make(architecture, seed, **cfg, matryoshka_widths=[d_sae])
    theirs = _make(TWINS[architecture], seed, **cfg)
    step_input = _step_input(batch, d_sae, seed + 1)
    _list_few(ours, listed)
    assert ours.training_path.fast
    output = ours.training_forward_pass(step_input)
    assert output.feature_acts.is_sparse is _is_listed(ours, listed)
    _assert_same_step(ours, output, theirs, theirs.training_forward_pass(step_input))


@st.composite
def _nested_options(draw: st.DrawFn, architecture: str, widths: list[int]) -> dict[str, Any]:
    """The options that variants have and their twins have not, in combinations that make sense."""
    d_sae, options = widths[-1], {}
    sampled = d_sae > 3 and draw(st.booleans())
    if sampled:
        n_prefixes = draw(st.integers(2, min(6, d_sae - 1)))
        options["prefix_sampling"] = {"n_prefixes": n_prefixes, "seed": draw(st.integers(0, 99))}
    elif draw(st.booleans()):
        options["level_weights"] = [draw(st.floats(0.1, 3.0)) for _ in widths]
    if sampled or len(widths) > 1:
        options["stop_gradient_between_levels"] = draw(st.sampled_from([False, True, "inner"]))
        options["snap_loss"] = draw(st.booleans())
        options["order_latents_by"] = draw(st.sampled_from([None, "contribution", "firing_frequency"]))
    options["loss_tilt"] = draw(st.sampled_from([0.0, 0.002, 1.0, -0.5]))
    options["aligned_encoder"] = draw(st.booleans())
    if architecture in ("matryoshka", "matryoshka_topk"):
        options["use_matryoshka_aux_loss"] = draw(st.booleans())
        if d_sae > 4 and draw(st.booleans()):
            options |= {"k_start": float(draw(st.integers(5, d_sae))), "k_anneal_steps": draw(st.integers(1, 20))}
    if architecture == "matryoshka_standard":
        options["l1_of_every_prefix"] = draw(st.booleans())
    return options


@pytest.mark.filterwarnings("ignore:.*only set one matryoshka level.*")
@pytest.mark.parametrize("architecture", TWINS)
@settings(max_examples=60, deadline=None)
@given(data=st.data(), widths=WIDTHS, batch=st.integers(1, 9), listed=st.booleans(), seed=st.integers(0, 10**6))
def test_the_fast_step_is_the_definition_with_every_option(
    architecture: str, data: st.DataObject, widths: list[int], batch: int, listed: bool, seed: int
):
    options = data.draw(_twin_options(architecture)) | data.draw(_nested_options(architecture, widths))
    if "k" in options:
        options["k"] = min(options["k"], widths[-1])
    if options.get("l1_of_every_prefix"):
        options["lp_norm"] = 1.0
    cfg = {"d_in": D_IN, "d_sae": widths[-1], "dtype": "float64", "matryoshka_widths": widths, **options}
    pair = [_make(architecture, seed, **cfg) for _ in range(2)]
    contribution = torch.rand(widths[-1], generator=torch.Generator().manual_seed(seed))
    for sae in pair:
        if options.get("order_latents_by"):
            sae.latent_order_statistic.copy_(contribution)
    fast, by_definition = pair
    by_definition.hook_sae_acts_post.add_hook(lambda tensor, hook: tensor)
    _list_few(fast, listed)
    assert (fast.training_path.fast, by_definition.training_path.fast) == (True, False)
    outputs = [sae.training_forward_pass(_step_input(batch, widths[-1], seed + 1, step=7)) for sae in pair]
    assert outputs[0].feature_acts.is_sparse is _is_listed(fast, listed)
    _assert_same_step(fast, outputs[0], by_definition, outputs[1])
    for name, buffer in by_definition.named_buffers():
        if name not in ("selection_guess", "share_that_matters"):  # which only the fast step reads
            torch.testing.assert_close(fast.get_buffer(name), buffer, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("architecture", TWINS)
@pytest.mark.parametrize("listed", [True, False])
def test_bfloat16_autocast(architecture: str, listed: bool):
    cfg: dict[str, Any] = {"d_in": D_IN, "d_sae": 64, "matryoshka_widths": [8, 64], "apply_b_dec_to_input": True}
    pair = [_make(architecture, 0, **cfg, **({"k": 6} if "topk" in TWINS[architecture] else {})) for _ in range(2)]
    pair[1].hook_sae_acts_post.add_hook(lambda tensor, hook: tensor)
    _list_few(pair[0], listed)
    step_input = _step_input(200, 64, 1, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [sae.training_forward_pass(step_input) for sae in pair]
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss, rtol=2e-2, atol=0, check_dtype=False)
    for output in outputs:
        output.loss.backward()
    for (name, ours), theirs in zip(pair[0].named_parameters(), pair[1].parameters(), strict=True):
        if theirs.grad is None:
            continue
        assert ours.grad is not None
        error = (ours.grad - theirs.grad).norm() / theirs.grad.norm().clamp(min=1e-6)
        assert error < 5e-2, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("architecture", TWINS)
def test_saved_as_its_twin_is_and_read_back_with_levels(architecture: str, tmp_path: Any):
    cfg = {"d_in": D_IN, "d_sae": 20, **({"k": 3} if "topk" in TWINS[architecture] else {})}
    ours = _make(architecture, 1, **cfg, matryoshka_widths=[5, 12, 20])
    twin = _make(TWINS[architecture], 1, **cfg)
    if architecture == "matryoshka":
        ours.topk_threshold.fill_(0.8)
        twin.topk_threshold.fill_(0.8)
    for sae, name in ((ours, "ours"), (twin, "twin")):
        sae.save_inference_model(tmp_path / name)
    saved, saved_twin = (SAE.load_from_disk(tmp_path / name) for name in ("ours", "twin"))
    assert type(saved) is type(saved_twin)
    assert saved.cfg.metadata.training_architecture == architecture
    x = torch.randn(40, D_IN, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(saved(x), saved_twin(x))
    with_levels = MatryoshkaSAE.load_from_disk(tmp_path / "ours")
    assert with_levels.widths == [5, 12, 20]
    torch.testing.assert_close(with_levels(x), saved_twin(x))
    torch.testing.assert_close(MatryoshkaSAE.from_sae(ours)(x), saved_twin(x))
    level_acts, reconstructions = with_levels.encode_levels(x), with_levels.reconstruct_levels(x)
    for level in range(3):
        cut_out = with_levels.at_level(level)
        assert cut_out.cfg.architecture() == saved_twin.cfg.architecture()
        cut_out.save_model(tmp_path / f"level_{level}")
        alone = SAE.load_from_disk(tmp_path / f"level_{level}")
        for acts in (with_levels.encode(x, level), level_acts[level], cut_out.encode(x)):
            torch.testing.assert_close(acts, alone.encode(x))
        for out in (with_levels.decode(level_acts[level], level), reconstructions[level], cut_out(x)):
            torch.testing.assert_close(out, alone(x))


def test_a_level_of_a_topk_sae_fires_the_largest_of_its_own_latents():
    ours = _make("matryoshka_topk", 1, d_in=D_IN, d_sae=20, k=3, matryoshka_widths=[2, 8, 20])
    sae = MatryoshkaSAE.from_sae(ours)
    x = torch.randn(40, D_IN, generator=torch.Generator().manual_seed(5))
    hidden_pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    for level, (width, k) in enumerate(((2, 2), (8, 3), (20, 3))):
        kept = hidden_pre[:, :width] >= hidden_pre[:, :width].topk(k).values[:, -1:]
        torch.testing.assert_close(sae.encode(x, level), hidden_pre[:, :width].relu() * kept)
    assert not sae.decode_levels(sae.encode(x))[0].equal(sae.reconstruct_levels(x)[0])
