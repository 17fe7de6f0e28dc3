"""Models whose weights are missing or damaged, which transformers would fill with random numbers."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, ByT5Tokenizer, Gemma3TextConfig, T5Config

from sae_lens_matryoshka.errors import UserError
from sae_lens_matryoshka.model_folders import check_model_folder
from sae_lens_matryoshka.training.run import train
from tests.tiny_runs import tiny_run

NORM = "model.layers.2.input_layernorm.weight"


@pytest.fixture
def model_folder(tinystories: Path, tmp_path: Path) -> Path:
    """A copy of the TinyStories model that a test may change."""
    return shutil.copytree(tinystories / "model", tmp_path / "model")


def _rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (
        lambda folder: _rewrite(folder, lambda weights: weights.pop(NORM)),
        rf"The model in .*model lacks {NORM}, which would be random numbers",
    ),
    "many missing": (
        lambda folder: _rewrite(folder, lambda weights: [weights.pop(name) for name in list(weights) if "mlp" in name]),
        r"lacks model.layers.0.mlp.down_proj.weight, .* and \d+ more, which",
    ),
    "another shape": (
        lambda folder: _rewrite(folder, lambda weights: weights.update({NORM: torch.ones(3)})),
        r"The weights in .*model are not those of the model in its config.json",
    ),
    "truncated": (_truncate, r"The weights .*model.safetensors are truncated or damaged .*; copy the model again"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_model_that_would_be_random_is_refused_by_name(
    damage: str, model_folder: Path, tinystories: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    change, message = DAMAGES[damage]
    check_model_folder(model_folder)
    assert "".join(capfd.readouterr()) == ""
    change(model_folder)
    with pytest.raises(UserError, match=message):
        check_model_folder(model_folder)
    run = {**tiny_run(tinystories, None), "model_name": str(model_folder)}
    with pytest.raises(UserError, match=message):
        train(run, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tied_and_sharded_weights_and_what_is_no_folder_of_weights_pass(model_folder: Path, tmp_path: Path):
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    _rewrite(model_folder, lambda weights: weights.pop("lm_head.weight", None))
    check_model_folder(model_folder)
    weights = load_file(model_folder / "model.safetensors")
    shards = {"model-1.safetensors": list(weights)[:20], "model-2.safetensors": list(weights)[20:]}
    for shard, names in shards.items():
        save_file({name: weights[name] for name in names}, model_folder / shard, {"format": "pt"})
    index: Any = {"metadata": {"total_size": 1}}
    index["weight_map"] = {name: shard for shard, names in shards.items() for name in names}
    (model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (model_folder / "model.safetensors").unlink()
    check_model_folder(model_folder)
    index["weight_map"].pop(NORM)
    shard = next(model_folder / shard for shard, names in shards.items() if NORM in names)
    kept = {name: tensor for name, tensor in copy.deepcopy(load_file(shard)).items() if name != NORM}
    save_file(kept, shard, {"format": "pt"})
    (model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=f"lacks {NORM}"):
        check_model_folder(model_folder)
    check_model_folder("gpt2")
    check_model_folder(tmp_path)


def test_a_model_without_a_tokenizer_is_refused(model_folder: Path, tmp_path: Path):
    for name in ("tokenizer.json", "tokenizer.model"):
        (model_folder / name).unlink(missing_ok=True)
    Gemma3TextConfig(vocab_size=1000).save_pretrained(tmp_path / "gemma")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "gemma")) < 10  # made of nothing, without a word
    for folder in (model_folder, tmp_path / "gemma"):
        with pytest.raises(UserError, match=r"The model in .* has no tokenizer .*; copy its tokenizer's files into"):
            check_model_folder(folder)


def test_a_tokenizer_that_needs_no_file_is_one(tmp_path: Path):
    config: Any = T5Config(vocab_size=384)
    config.tokenizer_class = "ByT5Tokenizer"
    config.save_pretrained(tmp_path)
    ByT5Tokenizer().save_pretrained(tmp_path)
    check_model_folder(tmp_path)


def test_a_gguf_file_is_told_how_to_convert(tmp_path: Path):
    (tmp_path / "gemma-Q4_K_M.gguf").touch()
    with pytest.raises(
        UserError, match=r"holds gemma-Q4_K_M.gguf and no config.json: convert it to Hugging Face's format"
    ):
        check_model_folder(tmp_path)
