"""The face of an SAE that SAEBench sees: unit norm, a hook, and the same reconstruction."""

import copy
from typing import Any

import pytest
import torch
from sae_lens import SAE, JumpReLUSAE, StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig

from sae_lens_matryoshka import MatryoshkaSAE
from sae_lens_matryoshka.bench.evaluated_saes import (
    EvaluatedSAE,
    Hook,
    SAEView,
    SharedEncoder,
    grouped,
    hook_of,
    levels,
)
from sae_lens_matryoshka.errors import UserError

HOOK = Hook("blocks.2.hook_resid_post", 2)


def test_a_view_has_unit_norm_and_changes_nothing(matryoshka_sae: MatryoshkaSAE):
    before = copy.deepcopy(matryoshka_sae)
    view, x = SAEView(matryoshka_sae, HOOK, "model"), torch.randn(50, 6)
    assert view.W_dec.norm(dim=-1).allclose(torch.ones(20))
    acts = view.encode(x)
    torch.testing.assert_close(view.decode(acts), matryoshka_sae(x))
    torch.testing.assert_close(acts @ view.W_dec + matryoshka_sae.b_dec, matryoshka_sae(x))
    folded = copy.deepcopy(matryoshka_sae.at_level(-1))
    assert isinstance(folded, JumpReLUSAE)
    folded.fold_W_dec_norm()
    torch.testing.assert_close(acts, folded.encode(x))
    torch.testing.assert_close(view.W_enc, folded.W_enc.detach())
    torch.testing.assert_close(view.b_enc, folded.b_enc.detach())
    for name, parameter in matryoshka_sae.state_dict().items():
        assert parameter.equal(before.state_dict()[name])
    assert matryoshka_sae.cfg == before.cfg
    assert view.cfg.metadata.hook_layer == 2


@pytest.mark.parametrize("kind", ["topk", "rescaled topk", "standard"])
def test_any_sae_can_be_a_baseline(kind: str):
    """Folding norms would change which latents a TopK SAE chooses; a view does not."""
    torch.manual_seed(0)
    sae = _random(
        StandardSAE(StandardSAEConfig(6, 20))
        if kind == "standard"
        else TopKSAE(TopKSAEConfig(6, 20, k=3, rescale_acts_by_decoder_norm=kind != "topk"))
    )
    view, x = SAEView(sae, HOOK, "model"), torch.randn(50, 6)
    acts = view.encode(x)
    torch.testing.assert_close(view.decode(acts), sae(x))
    torch.testing.assert_close(acts @ view.W_dec + sae.b_dec, sae(x))
    assert acts.bool().equal(sae.encode(x).bool())


@pytest.mark.parametrize("kind", ["jumprelu", "topk", "standard"])
def test_a_shared_encoder_holds_every_level(kind: str, matryoshka_sae: MatryoshkaSAE):
    """Levels of a TopK SAE choose among their own latents; those of the others are slices."""
    if kind != "jumprelu":
        cfg = TopKSAEConfig(6, 20, k=3) if kind == "topk" else StandardSAEConfig(6, 20)
        plain = TopKSAE(cfg) if isinstance(cfg, TopKSAEConfig) else StandardSAE(cfg)
        matryoshka_sae = MatryoshkaSAE.from_sae(_random(plain), [4, 8, 20])
    encoder, x = SharedEncoder(SAEView(matryoshka_sae, HOOK, "model")), torch.randn(50, 6)
    encoded = encoder.encode(x)
    assert encoded.shape[-1] == (32 if kind == "topk" else 20)
    for evaluated in levels("ours", matryoshka_sae):
        alone = SAEView(evaluated.cut_out, HOOK, "model").encode(x)
        torch.testing.assert_close(encoder.of_level(encoded, evaluated.level), alone)
        assert evaluated.width == alone.shape[-1]


def test_levels_are_named_and_chosen(matryoshka_sae: MatryoshkaSAE):
    assert [sae.sae_id for sae in levels("ours", matryoshka_sae, [-1, 0])] == ["level_0", "level_3"]
    assert str(levels("ours", matryoshka_sae, [1])[0]) == "ours level 1"
    plain = matryoshka_sae.at_level(2)
    assert levels("plain", plain) == [EvaluatedSAE("plain", plain)]
    with pytest.raises(UserError, match="ours: level 4 is out of range"):
        levels("ours", matryoshka_sae, [4])
    with pytest.raises(UserError, match="ours level 1 is there twice"):
        grouped(levels("ours", matryoshka_sae) + levels("ours", matryoshka_sae, [1]))


@pytest.mark.parametrize(
    ("recorded", "expected"),
    [
        ("blocks.3.hook_mlp_out", Hook("blocks.3.hook_mlp_out", 3)),
        ("model.layers.2", Hook("blocks.2.hook_resid_post", 2)),
        ("transformer.h.11", Hook("blocks.11.hook_resid_post", 11)),
        ("gpt_neox.layers.4", Hook("blocks.4.hook_resid_post", 4)),
    ],
)
def test_hooks_are_found_in_transformer_lens_names(recorded: str, expected: Hook, matryoshka_sae: MatryoshkaSAE):
    matryoshka_sae.cfg.metadata.hook_name = recorded
    assert hook_of(matryoshka_sae) == expected
    assert hook_of(matryoshka_sae, "blocks.0.hook_resid_pre") == Hook("blocks.0.hook_resid_pre", 0)


def test_a_hook_that_is_not_known_is_one_sentence(matryoshka_sae: MatryoshkaSAE):
    with pytest.raises(UserError, match="does not record its hook"):
        hook_of(matryoshka_sae)
    for name in ("model.norm", "blocks.².hook_resid_post", f"blocks.{'9' * 5000}.hook_resid_post"):
        with pytest.raises(UserError, match=rf"hook_name='{name[:20]}.* is not a hook of a block"):
            hook_of(matryoshka_sae, name)


def _random(sae: SAE[Any]) -> SAE[Any]:
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_()
    return sae
