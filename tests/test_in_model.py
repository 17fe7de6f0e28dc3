"""Levels in models, scaled and ablated, against decoding by hand; and what they leave behind, which is nothing."""

from typing import Any

import pytest
import torch
from sae_lens import HookedSAETransformer, SAETransformerBridge
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedModel

from sae_lens_matryoshka import MatryoshkaTopKSAE, MatryoshkaTopKSAEConfig, levels_in_model
from sae_lens_matryoshka.errors import UserError
from tests.by_hand import TOKENS, WIDTHS, assert_equal_and_changed, by_hand_in, sae_at
from tests.conftest import random_matryoshka_sae


@torch.no_grad()
def test_all_heads_of_hook_z_together_are_d_in_wide(hooked: HookedSAETransformer):
    sae = random_matryoshka_sae(WIDTHS, 16, reshape_activations="hook_z")
    sae.cfg.metadata.hook_name = "blocks.1.attn.hook_z"
    by_hand = hooked.run_with_hooks(TOKENS, fwd_hooks=[("blocks.1.attn.hook_z", lambda x, hook: sae(x))])
    unchanged = hooked(TOKENS)
    with levels_in_model(hooked, sae):
        assert_equal_and_changed(hooked(TOKENS), by_hand, unchanged)


@pytest.mark.parametrize("level", [None, 0, 1, -1])
@torch.no_grad()
def test_a_level_in_place_of_the_activation(
    level: int | None, bridge: SAETransformerBridge, hugging_face: PreTrainedModel
):
    sae = sae_at("model.layers.2")
    by_hand = by_hand_in(hugging_face, "model.layers.2", lambda x: sae.decode(sae.encode(x, level), level))
    with levels_in_model(bridge, sae, level):
        assert_equal_and_changed(bridge(TOKENS), by_hand, hugging_face(TOKENS).logits)


@torch.no_grad()
def test_a_level_of_topk_fires_its_own_largest(bridge: SAETransformerBridge, hugging_face: PreTrainedModel):
    sae = MatryoshkaTopKSAE(MatryoshkaTopKSAEConfig(64, WIDTHS[-1], k=4, matryoshka_widths=WIDTHS))
    for parameter in sae.parameters():
        parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    sae.cfg.metadata.hook_name = "model.layers.2"
    by_hand = by_hand_in(hugging_face, "model.layers.2", lambda x: sae.decode(sae.encode(x, 1), 1))
    with levels_in_model(bridge, sae, level=1) as attached:
        logits, cache = bridge.run_with_cache(TOKENS)
    assert_equal_and_changed(logits, by_hand, hugging_face(TOKENS).logits)
    fired = cache[f"{attached.cfg.metadata.hook_name}.hook_sae_acts_post"]
    assert fired.shape[-1] == WIDTHS[1]
    assert ((fired != 0).sum(-1) <= 4).all()


@pytest.mark.parametrize("use_error_term", [False, True])
@pytest.mark.parametrize(
    ("level", "scale_levels", "scaled"),
    [
        (None, {1: 0}, [(8, 32, 0.0)]),
        (None, {0: 0.0, -1: 2.5}, [(0, 8, 0.0), (32, 128, 2.5)]),
        (1, {1: -1.0}, [(8, 32, -1.0)]),
    ],
)
@torch.no_grad()
def test_scaled_and_ablated_levels_equal_decoding_by_hand(
    level: int | None,
    scale_levels: dict[int, float],
    scaled: list[tuple[int, int, float]],
    use_error_term: bool,
    bridge: SAETransformerBridge,
    hugging_face: PreTrainedModel,
):
    sae = sae_at("model.layers.2")

    def by(x: Tensor) -> Tensor:
        acts = sae.encode(x, level)
        changed = acts.clone()
        for first, end, factor in scaled:
            changed[..., first:end] *= factor
        error = x - sae.decode(acts, level) if use_error_term else 0
        return sae.decode(changed, level) + error

    by_hand = by_hand_in(hugging_face, "model.layers.2", by)
    with levels_in_model(bridge, sae, level, scale_levels, use_error_term) as attached:
        assert_equal_and_changed(bridge(TOKENS), by_hand, hugging_face(TOKENS).logits)
        logits, cache = bridge.run_with_cache(TOKENS)
    assert_close(logits, by_hand, rtol=1e-4, atol=1e-4)
    latents = cache[f"{attached.cfg.metadata.hook_name}.hook_sae_acts_post"]
    unscaled = sae.encode(cache["blocks.2.hook_out.hook_sae_input"], level)
    for first, end, factor in scaled:
        assert unscaled[..., first:end].any()
        assert_close(latents[..., first:end], unscaled[..., first:end] * factor)


@torch.no_grad()
def test_with_the_error_term_and_nothing_scaled_the_model_is_its_own(bridge: SAETransformerBridge):
    sae = sae_at("model.layers.2")
    unchanged = bridge(TOKENS)
    for level in (None, 0):
        with levels_in_model(bridge, sae, level, use_error_term=True):
            assert_close(bridge(TOKENS), unchanged, rtol=1e-4, atol=1e-4)
    with levels_in_model(bridge, sae, 0):
        assert not torch.allclose(bridge(TOKENS), unchanged, rtol=1e-2)
    sae.use_error_term = True  # which use_error_term=None takes
    with levels_in_model(bridge, sae, 0):
        assert_close(bridge(TOKENS), unchanged, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_levels_in_a_hooked_transformer(hooked: HookedSAETransformer):
    sae = sae_at("blocks.1.hook_out", d_in=16)  # the bridge's name

    def by(x: Tensor, hook: Any) -> Tensor:
        acts = sae.encode(x, 1)
        changed = torch.cat([acts[..., :8] * 3, acts[..., 8:]], -1)
        return x - sae.decode(acts, 1) + sae.decode(changed, 1)

    unchanged, hooks = hooked(TOKENS), list(hooked.hook_dict)
    by_hand = hooked.run_with_hooks(TOKENS, fwd_hooks=[("blocks.1.hook_resid_post", by)])
    with levels_in_model(hooked, sae, 1, {0: 3.0}, use_error_term=True):
        assert_equal_and_changed(hooked(TOKENS), by_hand, unchanged)
        hooked.reset_hooks()  # takes off the caller's, not ours
        assert_equal_and_changed(hooked(TOKENS), by_hand, unchanged)
    assert torch.equal(hooked(TOKENS), unchanged)
    assert list(hooked.hook_dict) == hooks
    assert hooked.acts_to_saes == {}


@pytest.mark.parametrize("kind", ["bridge", "hooked"])
@pytest.mark.parametrize("error", [None, KeyError])
@torch.no_grad()
def test_afterwards_the_model_is_as_it_was(
    kind: str, error: type[Exception] | None, request: pytest.FixtureRequest, hooked: HookedSAETransformer
):
    model = hooked if kind == "hooked" else request.getfixturevalue("bridge")
    d_in, hook_name = model.cfg.d_model, "blocks.1.hook_resid_post" if kind == "hooked" else "blocks.1.hook_out"
    seen: list[Tensor] = []
    model.add_hook(hook_name, lambda tensor, hook: seen.append(tensor))
    hooks = dict(model.hook_dict)
    unchanged = model(TOKENS)
    assert len(seen) == 1
    try:
        with levels_in_model(model, sae_at(hook_name, d_in), 0):
            assert not torch.equal(model(TOKENS), unchanged)
            if error:
                raise error
    except KeyError:
        pass
    assert model.acts_to_saes == {}
    assert dict(model.hook_dict) == hooks
    seen.clear()
    assert torch.equal(model(TOKENS), unchanged)
    assert len(seen) == 1  # SAELens's own contexts lose the hook
    model.reset_hooks()


@pytest.mark.parametrize("kind", ["bridge", "hooked"])
@torch.no_grad()
def test_saes_that_are_attached_stay_attached(kind: str, request: pytest.FixtureRequest, hooked: HookedSAETransformer):
    model = hooked if kind == "hooked" else request.getfixturevalue("bridge")
    d_in = model.cfg.d_model
    there, elsewhere = sae_at("blocks.1.hook_resid_post", d_in, 1), sae_at("blocks.0.hook_resid_post", d_in, 2)
    ours = sae_at("model.layers.1", d_in, 3)
    with model.saes([elsewhere]), levels_in_model(model, ours, 0):
        beside_elsewhere = model(TOKENS)
    try:
        model.add_sae(there, use_error_term=True)
        model.add_sae(elsewhere)
        attached, before = model.acts_to_saes, model(TOKENS)
        with levels_in_model(model, ours, 0) as level:
            assert set(map(id, model.acts_to_saes.values())) == {id(level), id(elsewhere)}
            assert torch.equal(model(TOKENS), beside_elsewhere)
            with levels_in_model(model, ours, 1):
                assert not torch.equal(model(TOKENS), beside_elsewhere)
            assert torch.equal(model(TOKENS), beside_elsewhere)
            model.reset_saes()  # what was attached before is put back even so
        model.add_sae(elsewhere)
        assert model.acts_to_saes == attached
        assert torch.equal(model(TOKENS), before)
    finally:
        model.reset_saes()
    assert not any(".hook_sae_" in name for name in model.hook_dict)


def test_gradients_reach_the_model_and_the_weights(bridge: SAETransformerBridge):
    sae = sae_at("model.layers.2")
    with levels_in_model(bridge, sae, scale_levels={2: 0.0}):
        bridge(TOKENS, return_type="loss").backward()
    assert sae.W_dec.grad is not None
    assert sae.W_dec.grad[:32].any()
    assert not sae.W_dec.grad[32:].any()
    bridge.zero_grad()


def test_saes_that_record_their_widths_need_not_be_converted(bridge: SAETransformerBridge):
    plain = sae_at("model.layers.2").at_level(1)
    with levels_in_model(bridge, plain, 0) as attached:
        assert attached.cfg.d_sae == WIDTHS[0]
    del plain.cfg.metadata.matryoshka_widths
    with pytest.raises(ValueError, match="does not record its level widths"), levels_in_model(bridge, plain, 0):
        pass


@pytest.mark.parametrize(
    ("level", "scale_levels", "error", "message"),
    [
        (3, {}, IndexError, "level 3 is out of range"),
        (None, {3: 0.0}, IndexError, "level 3 is out of range"),
        (0, {1: 0.0}, UserError, r"scale_levels=\{1: 0.0\}: level 1 is not part of level=0; leave it out"),
        (None, {2: 0.0, -1: 2.0}, UserError, "two factors for level 2; give one"),
        (None, {0: float("nan")}, UserError, "nan is not a finite number; use 0 to ablate"),
    ],
)
def test_levels_that_cannot_be_scaled_are_named(
    level: int | None,
    scale_levels: dict[int, float],
    error: type[Exception],
    message: str,
    bridge: SAETransformerBridge,
):
    with pytest.raises(error, match=message), levels_in_model(bridge, sae_at("model.layers.2"), level, scale_levels):
        pass
    assert bridge.acts_to_saes == {}
