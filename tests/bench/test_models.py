"""Models that would give numbers without a meaning are refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_lens_matryoshka import MatryoshkaSAE
from sae_lens_matryoshka.bench import evaluate, levels, load_model
from sae_lens_matryoshka.bench.activation_source import ActivationSource, TextSpec
from sae_lens_matryoshka.bench.core import Core
from sae_lens_matryoshka.bench.evaluated_saes import Hook
from sae_lens_matryoshka.bench.upstream import CoreEvalConfig
from sae_lens_matryoshka.errors import UserError

UP = "model.layers.1._original_component.mlp._original_component.up_proj._original_component.weight"
HOOK = Hook("blocks.2.hook_resid_post", 2)


def _core(tinystories: Path) -> Core:
    text = str(tinystories / "data" / "validation.jsonl")
    return Core(CoreEvalConfig(dataset=text, context_size=32, batch_size_prompts=2, n_eval_reconstruction_batches=1,
                               n_eval_sparsity_variance_batches=1))  # fmt: skip


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_weights_that_are_not_finite_are_refused(name: str, sae: MatryoshkaSAE, tinystories: Path, tmp_path: Path):
    folder = shutil.copytree(tinystories / "model", tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights[name].view(-1)[-1] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="of model holds values that are NaN or infinite"):
        evaluate(levels("ours", sae), folder, tmp_path / "out", [_core(tinystories)])
    assert not (tmp_path / "out").exists()


def test_a_model_without_all_its_tensors_is_refused(tinystories: Path, tmp_path: Path):
    folder = shutil.copytree(tinystories / "model", tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.2.input_layernorm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks model.layers.2.input_layernorm.weight"):
        load_model(folder)
    (folder / "model.safetensors").write_bytes(b"123")
    with pytest.raises(UserError, match=r"model.safetensors are truncated or damaged"):
        load_model(folder)


def test_activations_and_losses_that_overflow_are_refused(sae: MatryoshkaSAE, tinystories: Path, tmp_path: Path):
    model = load_model(tinystories / "model")
    for name, parameter in model.named_parameters():
        if "mlp" in name:  # of three, the product of two overflows
            parameter.data *= 1e30
    source = ActivationSource(model)
    texts = {"a": ["Once upon a time"], "b": ["The end."]}
    with pytest.raises(UserError, match=r"Activations of model at blocks.2.hook_resid_post are NaN or infinite"):
        source.of_text(TextSpec(texts, texts, HOOK, 8, batch_size=2))
    report = evaluate(levels("ours", sae), source, tmp_path, [_core(tinystories)])
    assert report.results.empty
    assert "use a data type of more range" in report.failures["core"]
    assert json.dumps([str(path) for path in tmp_path.rglob("*.json")]) == "[]"
