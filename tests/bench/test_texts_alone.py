"""Every activation that an evaluation uses is the one the model gives that text alone, whatever its tokenizer does."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import LanguageModelSAETrainingRunner
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from sae_lens_matryoshka import MatryoshkaSAE
from sae_lens_matryoshka.bench.activation_source import ActivationSource, TextActivations, TextSpec
from sae_lens_matryoshka.bench.evaluated_saes import Hook, SAEView
from sae_lens_matryoshka.bench.models import Model, load_model
from sae_lens_matryoshka.bench.texts_alone import activations_alone, is_special, text_tokens
from sae_lens_matryoshka.bench.word_prompts import WordPrompts
from sae_lens_matryoshka.errors import UserError
from sae_lens_matryoshka.run_files.building import build_runner_configs
from tests.conftest import real_model
from tests.tiny_runs import tiny_run

HOOK = Hook("blocks.2.hook_resid_post", 2)
CONTEXT = 24
TEXTS = [
    "Once",
    "Once upon a time there was a girl",
    "<s>Tom ran home",
    "She saw a big red ball. She wanted to play with it, but her mother said no.",
    "a",
    "Lily and Tom like to run in the park with their dog and their big red ball every day after school is over.",
]


def _tinystories(folder: Path, tinystories: Path, **tokenizer_config: Any) -> Path:
    """The TinyStories model with another tokenizer config."""
    shutil.copytree(tinystories / "model", folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | tokenizer_config))
    if not tokenizer_config.get("add_bos_token", True):
        path = folder / "tokenizer.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": None}))
    return folder


def _gpt2_like_tokenizer(folder: Path, padding_side: str, add_bos: bool) -> Any:
    """One token serves as BOS, EOS and padding, as GPT-2's does."""
    words = sorted({word for text in TEXTS for word in text.split()})
    vocabulary = {word: index for index, word in enumerate(["<|endoftext|>", "?", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
    end: Any = "<|endoftext|>"
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=end,
        eos_token=end,
        pad_token=end,
        unk_token="?",
        padding_side=padding_side,
    )  # fmt: skip
    fast.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def _hooked_transformer(tokenizer: Any, positions: str) -> HookedTransformer:
    torch.manual_seed(0)
    return HookedTransformer(
        HookedTransformerConfig(
            n_layers=3, d_model=32, n_ctx=64, d_head=8, d_vocab=80, act_fn="gelu", seed=0, tokenizer_name=None,
            positional_embedding_type=positions, model_name="random",
        ),
        tokenizer=tokenizer,
    )  # fmt: skip


def _assert_alone(model: Model, alone: Callable[[list[int]], torch.Tensor], tolerance: float) -> None:
    """Our activations of texts run together equal those of each text run alone; one BOS, and no special token."""
    spec = TextSpec({"a": TEXTS, "b": TEXTS[::-1]}, {"a": TEXTS[1:3], "b": TEXTS[3:5]}, HOOK, CONTEXT, batch_size=4)
    source = ActivationSource(model)
    activations = source.of_text(spec)
    tokenizer: Any = model.tokenizer
    for texts, of_class in ((TEXTS, activations.train["a"]), (TEXTS[3:5], activations.test["b"])):
        means = of_class.means()
        for text, found, mean in zip(texts, of_class.values.split(of_class.lengths), means, strict=True):
            own = [t for t in tokenizer(text, add_special_tokens=False)["input_ids"] if t != tokenizer.bos_token_id]
            expected = alone([tokenizer.bos_token_id, *own][:CONTEXT])
            error = (found[1:] - expected[1:]).norm() / expected[1:].norm()
            assert error < tolerance, f"{text!r} is off by {error:.1%}"
            assert not found[0].any(), "BOS counts"
            assert (mean - expected[1:].mean(0)).norm() / mean.norm() < tolerance


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("add_bos_token", [True, False])
def test_the_bridge_with_every_kind_of_tokenizer(
    tinystories: Path, tmp_path: Path, padding_side: str, add_bos_token: bool
):
    folder = _tinystories(tmp_path / "m", tinystories, padding_side=padding_side, add_bos_token=add_bos_token)
    reference = AutoModelForCausalLM.from_pretrained(folder)

    def alone(tokens: list[int]) -> torch.Tensor:
        return reference(torch.tensor([tokens]), output_hidden_states=True).hidden_states[HOOK.layer + 1][0]

    model = load_model(folder)
    assert model.tokenizer.padding_side == padding_side  # type: ignore[union-attr]
    _assert_alone(model, alone, 1e-5)


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("add_bos_token", [True, False])
@pytest.mark.parametrize("positions", ["standard", "rotary"])
def test_hooked_transformer_with_a_tokenizer_that_pads_with_its_bos(
    tmp_path: Path, padding_side: str, add_bos_token: bool, positions: str
):
    tokenizer = _gpt2_like_tokenizer(tmp_path, padding_side, add_bos_token)
    model = _hooked_transformer(tokenizer, positions)
    # the reference has no tokenizer, so that TransformerLens has nothing to guess padding from
    reference = _hooked_transformer(None, positions)
    reference.load_state_dict(model.state_dict())

    def alone(tokens: list[int]) -> torch.Tensor:
        return reference.run_with_cache(torch.tensor([tokens]))[1][HOOK.name][0]

    _assert_alone(model, alone, 1e-5)


def test_the_real_gemma():
    folder = real_model("gemma-3-270m")
    model = load_model(folder, dtype="bfloat16")
    assert model.tokenizer.padding_side == "left"  # type: ignore[union-attr] # else this shows nothing
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)

    def alone(tokens: list[int]) -> torch.Tensor:
        return reference(torch.tensor([tokens]), output_hidden_states=True).hidden_states[HOOK.layer + 1][0]

    _assert_alone(model, alone, 2e-2)


def test_the_words_of_absorption_prompts_are_read_alone(tinystories: Path, tmp_path: Path):
    folder = _tinystories(tmp_path / "m", tinystories, padding_side="left", add_bos_token=False)
    model = load_model(folder)
    together = WordPrompts(model, HOOK, -2).run_with_cache(TEXTS, ["hook"])[1]["hook"][:, 0]
    for text, found in zip(TEXTS, together, strict=True):
        (tokens,) = text_tokens(model, [text])
        ((_, alone),) = activations_alone(model, [tokens], HOOK, 1)
        torch.testing.assert_close(found, alone[-2], rtol=1e-4, atol=1e-5)


def test_texts_are_padded_to_their_batch_and_not_to_the_context(model: Model, monkeypatch: pytest.MonkeyPatch):
    n_tokens = 0
    run_with_cache = model.run_with_cache

    def counting(tokens: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        nonlocal n_tokens
        n_tokens += tokens.numel()
        return run_with_cache(tokens, *arguments, **options)

    monkeypatch.setattr(model, "run_with_cache", counting)
    texts = ["Once upon a time", *(["a dog"] * 3), *(["a big dog ran and ran and ran"] * 4)]
    source = ActivationSource(model)
    found = source.of_text(TextSpec({"a": texts}, {"a": texts[:1]}, HOOK, context_length=512, batch_size=4))
    lengths = [len(tokens) for tokens in text_tokens(model, texts)]
    assert found.train["a"].lengths == lengths
    assert n_tokens < 1.5 * (sum(lengths) + lengths[0])


def test_saes_encode_tokens_only(model: Model, sae: MatryoshkaSAE, monkeypatch: pytest.MonkeyPatch):
    encode, encoded = sae.encode, []

    def counting(x: torch.Tensor, *arguments: Any) -> Any:
        encoded.append(x)
        return encode(x, *arguments)

    monkeypatch.setattr(sae, "encode", counting)
    spec = TextSpec({"a": TEXTS}, {"a": TEXTS[:2]}, HOOK, context_length=64, batch_size=4)
    source = ActivationSource(model)
    pooled = source.pooled_latents(spec, SAEView(sae, HOOK, "model"), None)
    activations = source.of_text(spec).train["a"]
    expected = [encode(of_text[1:]).mean(0) for of_text in activations.values.split(activations.lengths)]
    torch.testing.assert_close(pooled.of_texts.train["a"], torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert len(torch.cat(encoded)) == sum(activations.lengths) - len(TEXTS) + sum(activations.lengths[:2]) - 2 + 1


def test_padding_is_put_where_saebench_puts_it():
    of_class = TextActivations(torch.arange(10.0).reshape(5, 2), [2, 3], context_length=4)
    padded = of_class.padded()
    assert padded.shape == (2, 4, 2)
    torch.testing.assert_close(torch.cat([padded[0, :2], padded[1, :3]]), of_class.values)
    assert not padded[0, 2:].any()
    assert not padded[1, 3:].any()
    assert torch.equal(torch.cat(list(of_class.padded_blocks(1))), padded)


def test_a_text_without_a_token_of_its_own_is_named(model: Model):
    spec = TextSpec({"a": ["Once", "</s>"]}, {"a": ["Once"]}, HOOK, CONTEXT, batch_size=4)
    with pytest.raises(UserError, match="The train text '</s>' of class 'a' is nothing but special tokens"):
        ActivationSource(model).of_text(spec)
    assert is_special(model, torch.tensor([0, 1, 2, 3])).tolist() == [False, True, True, False]


def test_a_text_with_a_token_that_the_model_has_no_embedding_for_is_named(
    model: Model, monkeypatch: pytest.MonkeyPatch
):
    """Llama's tokenizer with a pad token of its own, for one, has one token more than the model."""
    assert model.tokenizer is not None
    added = copy.deepcopy(model.tokenizer)
    added.add_tokens("<unheard of>")
    monkeypatch.setattr(model, "tokenizer", added)
    with pytest.raises(
        UserError, match=r"The text 'Once <unheard of>' has the token '.*unheard.*' \(512\), but the model"
    ):
        text_tokens(model, ["Once", "Once <unheard of>"])


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("add_bos_token", [True, False])
def test_training_calibration_and_measuring_read_rows_alone_too(
    tinystories: Path, tmp_path: Path, padding_side: str, add_bos_token: bool
):
    """They take SAELens's store, whose rows are as long as the context: nothing is padded."""
    folder = _tinystories(tmp_path / "m", tinystories, padding_side=padding_side, add_bos_token=add_bos_token)
    config: Any = build_runner_configs(tiny_run(tinystories, None, model_name=str(folder)))
    store = LanguageModelSAETrainingRunner(config).activations_store
    rows = store.get_batch_tokens(3)
    assert rows.shape == (3, config.context_size)
    is_bos = rows == 1
    assert is_bos[:, 0].all()
    assert not (is_bos[:, 1:] & is_bos[:, :-1]).any()
    reference = AutoModelForCausalLM.from_pretrained(folder)
    for row, found in zip(rows, store.get_activations(rows), strict=True):
        expected = reference(row[None], output_hidden_states=True).hidden_states[HOOK.layer + 1][0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
