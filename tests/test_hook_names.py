"""SAEs attach under whatever name their hook has, and change the model as replacing the activation by hand does."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from sae_lens import HookedSAETransformer, SAETransformerBridge
from transformer_lens import HookedTransformer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from sae_lens_matryoshka import MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig, for_transformer_lens
from sae_lens_matryoshka.errors import UserError
from tests.by_hand import TOKENS, WIDTHS, assert_equal_and_changed, by_hand_in, sae_at
from tests.conftest import random_matryoshka_sae

# hook_name of the SAE, the Hugging Face module whose output it is, and the bridge's own name
NAMES = [
    ("model.layers.2", "model.layers.2", "blocks.2.hook_out"),
    ("model.language_model.layers.2", "model.layers.2", "blocks.2.hook_out"),
    ("model.layers.2.mlp", "model.layers.2.mlp", "blocks.2.mlp.hook_out"),
    ("model.layers.2.self_attn", "model.layers.2.self_attn", "blocks.2.attn.hook_out"),
    ("model.layers.2.input_layernorm", "model.layers.2.input_layernorm", "blocks.2.ln1.hook_out"),
    ("model.embed_tokens", "model.embed_tokens", "embed.hook_out"),
    ("blocks.2.hook_resid_post", "model.layers.2", "blocks.2.hook_out"),
    ("blocks.2.hook_out", "model.layers.2", "blocks.2.hook_out"),
    ("blocks.2.hook_resid_pre", "model.layers.1", "blocks.2.hook_in"),
    ("blocks.2.hook_mlp_out", "model.layers.2.mlp", "blocks.2.mlp.hook_out"),
    ("blocks.2.hook_attn_out", "model.layers.2.self_attn", "blocks.2.attn.hook_out"),
    ("hook_embed", "model.embed_tokens", "embed.hook_out"),
]


@pytest.mark.parametrize(("hook_name", "module", "on_bridge"), NAMES)
@torch.no_grad()
def test_an_attached_sae_equals_replacing_the_activation_by_hand(
    hook_name: str, module: str, on_bridge: str, bridge: SAETransformerBridge, hugging_face: PreTrainedModel
):
    sae = sae_at(hook_name)
    attached = for_transformer_lens(sae, bridge)
    assert attached.cfg.metadata.hook_name == on_bridge
    by_hand = by_hand_in(hugging_face, module, sae)
    logits, cache = bridge.run_with_cache_with_saes(TOKENS, saes=[attached])
    assert_equal_and_changed(logits, by_hand, hugging_face(TOKENS).logits)
    assert cache[f"{on_bridge}.hook_sae_acts_post"].shape == (*TOKENS.shape, WIDTHS[-1])


@pytest.mark.parametrize("hook_name", ["model.layers.1", "transformer.h.1", "gpt_neox.layers.1"])
@torch.no_grad()
def test_without_a_model_blocks_get_the_name_that_both_kinds_of_model_know(
    hook_name: str, bridge: SAETransformerBridge, hugging_face: PreTrainedModel, hooked: HookedSAETransformer
):
    sae = for_transformer_lens(sae_at(hook_name))
    assert sae.cfg.metadata.hook_name == "blocks.1.hook_resid_post"
    by_hand = by_hand_in(hugging_face, "model.layers.1", sae)
    assert_equal_and_changed(bridge.run_with_saes(TOKENS, saes=sae), by_hand, bridge(TOKENS))
    small = for_transformer_lens(sae_at(hook_name, d_in=16))
    by_hand = hooked.run_with_hooks(TOKENS, fwd_hooks=[("blocks.1.hook_resid_post", lambda x, hook: small(x))])
    assert_equal_and_changed(hooked.run_with_saes(TOKENS, saes=small), by_hand, hooked(TOKENS))


def test_names_of_transformer_lens_stay_without_a_model():
    for name in ("blocks.2.hook_resid_pre", "blocks.2.hook_mlp_out", "blocks.2.attn.hook_z", "hook_embed"):
        assert for_transformer_lens(sae_at(name)).cfg.metadata.hook_name == name


SMALL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
GROUPED = {**SMALL, "num_key_value_heads": 1, "head_dim": 8}
GPT2 = {"vocab_size": 512, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
NEO = {**SMALL, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]}
ARCHITECTURES: list[tuple[str, dict[str, Any], list[str]]] = [
    ("GPT2Config", GPT2, ["transformer.h.1", "transformer.h.1.mlp"]),
    ("GPTNeoConfig", NEO, ["transformer.h.1", "transformer.h.1.attn"]),
    ("GPTNeoXConfig", SMALL, ["gpt_neox.layers.1", "gpt_neox.layers.1.mlp"]),
    ("Gemma2Config", GROUPED, ["model.layers.1", "model.layers.1.post_feedforward_layernorm"]),
    ("Gemma3TextConfig", GROUPED, ["model.layers.1", "model.layers.1.mlp"]),
    ("MistralConfig", GROUPED, ["model.layers.1", "model.layers.1.self_attn.o_proj"]),
    ("Qwen2Config", {**SMALL, "num_key_value_heads": 1}, ["model.layers.1", "model.layers.1.self_attn"]),
    ("Qwen3Config", GROUPED, ["model.layers.1", "model.layers.1.mlp.down_proj"]),
    ("OPTConfig", {**SMALL, "ffn_dim": 32, "word_embed_proj_dim": 16}, ["model.decoder.layers.1"]),
]


@pytest.mark.parametrize(("config", "sizes", "modules"), ARCHITECTURES, ids=[config for config, *_ in ARCHITECTURES])
@torch.no_grad()
def test_modules_of_every_architecture_are_found(
    config: str, sizes: dict[str, Any], modules: list[str], tinystories: Path, tmp_path: Path
):
    cfg: PreTrainedConfig = getattr(transformers, config)(**sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(cfg, attn_implementation="eager").eval()
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tinystories / "model").save_pretrained(tmp_path)
    bridge = SAETransformerBridge.boot_transformers(str(tmp_path), device="cpu")
    for module in modules:
        sae = sae_at(module, d_in=16)
        logits = bridge.run_with_saes(TOKENS, saes=for_transformer_lens(sae, bridge))
        assert_equal_and_changed(logits, by_hand_in(model, module, sae), model(TOKENS).logits)


def test_weights_are_shared_and_the_config_is_the_new_saes_own(bridge: SAETransformerBridge):
    sae = sae_at("model.layers.2")
    sae.cfg.metadata.model_name = "a model"
    training_sae = MatryoshkaTrainingSAE(MatryoshkaTrainingSAEConfig(64, 128, k=4, matryoshka_widths=WIDTHS))
    training_sae.cfg.metadata.hook_name = "model.layers.2"
    for one in (sae, sae.at_level(1), training_sae):
        renamed = for_transformer_lens(one, bridge)
        assert type(renamed) is type(one)
        assert all(a is b for a, b in zip(renamed.parameters(), one.parameters(), strict=True))
        assert (renamed.device, renamed.dtype, renamed.training) == (one.device, one.dtype, one.training)
        assert one.cfg.metadata.hook_name == "model.layers.2"
        as_before = {**one.cfg.to_dict(), "metadata": {**one.cfg.metadata.to_dict(), "hook_name": "blocks.2.hook_out"}}
        assert renamed.cfg.to_dict() == as_before


def test_hooks_without_a_counterpart_are_one_sentence(bridge: SAETransformerBridge, hooked: HookedSAETransformer):
    with pytest.raises(UserError, match=r"hook_name='model.layers.2.mlp'.*pass a SAETransformerBridge too"):
        for_transformer_lens(sae_at("model.layers.2.mlp"))
    with pytest.raises(UserError, match=r"hook_name='vision_tower.encoder.layers.2'"):
        for_transformer_lens(sae_at("vision_tower.encoder.layers.2"))
    for name in ("model.layers.2.mlp.act_fn", "model.layers.77", "blocks.2.hook_nothing"):
        with pytest.raises(UserError, match=f"SAETransformerBridge has no hook for hook_name='{name}'; name one of"):
            for_transformer_lens(sae_at(name), bridge)
    with pytest.raises(UserError, match=r"hook_name='transformer.h.1.mlp'.*or load it as a SAETransformerBridge"):
        for_transformer_lens(sae_at("transformer.h.1.mlp", d_in=16), hooked)
    unnamed = random_matryoshka_sae(WIDTHS)
    with pytest.raises(UserError, match=r"does not record its hook; set sae\.cfg\.metadata\.hook_name"):
        for_transformer_lens(unnamed)


def test_a_model_of_another_width_or_that_takes_no_saes_is_one_sentence(
    bridge: SAETransformerBridge, hooked: HookedSAETransformer
):
    with pytest.raises(UserError, match=r"hook_name='model.layers.2' is 64 wide in this model, the SAE's d_in=16"):
        for_transformer_lens(sae_at("model.layers.2", d_in=16), bridge)
    with pytest.raises(UserError, match="HookedTransformer takes no SAEs; load the model with"):
        for_transformer_lens(sae_at("blocks.0.hook_resid_post", d_in=16), HookedTransformer(hooked.cfg))  # type: ignore[arg-type]
