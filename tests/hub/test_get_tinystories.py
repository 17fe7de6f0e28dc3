"""The TinyStories model and text as `examples/get_tinystories.py` makes them: what the model's author published.

The published files are rebuilt from the shared model, checked by their SHA-256 and served by the local Hub.
"""

import hashlib
import json
import math
import os
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file

from examples import get_tinystories
from examples.get_tinystories import MODEL_REPOSITORY, MODEL_REVISION, read_model, read_tokenizer, split_stories
from sae_lens_matryoshka.errors import UserError
from tests.hub.local_hub import LocalHub

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
MODEL_SHA256 = "b0a507e7ad0f626624f17112325e66691f9076d622e1d3274d103d00299f2696"
TOKENS_SHA256 = "037cb335abb25d1fa9e8ecae30ed2a3a8ace9302862ebcdc05d51a6bbb10c312"


def _published_model(folder: Path) -> bytes:
    """The shared model in llama2.c's format, as its author published it."""
    weights = load_file(folder / "model.safetensors")

    def layers(name: str, heads: int = 0) -> list[torch.Tensor]:
        found = [weights[f"model.layers.{layer}.{name}.weight"] for layer in range(5)]
        return [w.view(heads, 2, 4, 64).transpose(1, 2).reshape(-1, 64) for w in found] if heads else found

    angles = torch.outer(torch.arange(512).float(), 1 / 10000 ** (torch.arange(0, 8, 2).float() / 8))
    tensors = [
        weights["model.embed_tokens.weight"],
        *layers("input_layernorm"), *layers("self_attn.q_proj", 8), *layers("self_attn.k_proj", 4),
        *layers("self_attn.v_proj"), *layers("self_attn.o_proj"), *layers("post_attention_layernorm"),
        *layers("mlp.gate_proj"), *layers("mlp.down_proj"), *layers("mlp.up_proj"), weights["model.norm.weight"],
        angles.cos(), angles.sin(),
    ]  # fmt: skip
    header = struct.pack("<7i", 64, 172, 5, 8, 4, 512, 512)
    return header + b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)


def _published_tokens(folder: Path) -> bytes:
    vocabulary = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    pieces = sorted(vocabulary, key=vocabulary.__getitem__)
    pieces[1:3] = "\n<s>\n", "\n</s>\n"
    texts = [piece.replace("▁", " ").encode() for piece in pieces]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(pieces) - 259)]
    tokens = [struct.pack("<fi", score, len(text)) + text for score, text in zip(scores, texts, strict=True)]
    return struct.pack("<i", max(map(len, texts))) + b"".join(tokens)


@pytest.fixture(scope="module")
def published(tinystories: Path) -> dict[str, bytes]:
    files = {
        "stories260K/stories260K.bin": _published_model(tinystories / "model"),
        "stories260K/tok512.bin": _published_tokens(tinystories / "model"),
    }
    assert [hashlib.sha256(content).hexdigest() for content in files.values()] == [MODEL_SHA256, TOKENS_SHA256]
    return files


def _rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_command_of_the_readme_makes_the_folder(
    local_hub: LocalHub,
    published: dict[str, bytes],
    tinystories: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    stories = [row for name in ("train", "validation") for row in _rows(tinystories / f"data/{name}.jsonl")]
    text = "\n<|endoftext|>\n".join(row["text"] for row in stories) + "\n<|endoftext|>\nOne more.\n<|endoftext|>\n"
    models = local_hub.create(MODEL_REPOSITORY, published)
    models.commits[MODEL_REVISION] = models.files()
    models.commit("main", {}, "everything is gone from the newest revision")
    local_hub.create("datasets/roneneldan/TinyStories", {"TinyStories-valid.txt": text.encode()})

    (command,) = re.findall(r"^python (.*) && export TINYSTORIES=\$PWD/tinystories$", README, re.MULTILINE)
    script, folder = command.split()
    assert (REPOSITORY / script).samefile(get_tinystories.__file__)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN")
    assert get_tinystories.main([folder]) == 0
    made = tmp_path / "tinystories"
    assert os.listdir(tmp_path) == ["tinystories"]
    assert _rows(made / "data/train.jsonl") + _rows(made / "data/validation.jsonl") == stories

    ours, theirs = (load_file(folder / "model/model.safetensors") for folder in (made, tinystories))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        ours, theirs = (json.loads((folder / "model" / name).read_text("utf-8")) for folder in (made, tinystories))
        # what another version of transformers may leave out, name otherwise or add
        shared = ours.keys() & theirs.keys() - {"transformers_version", "torch_dtype", "dtype"}
        assert {key: ours[key] for key in shared} == {key: theirs[key] for key in shared}, name

    capsys.readouterr()
    assert get_tinystories.main([folder]) == 1
    message = "error: tinystories is there already; remove it, or give the name of another folder.\n"
    assert capsys.readouterr().err == message


def test_without_the_hub_the_command_is_one_sentence(
    local_hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert get_tinystories.main([str(tmp_path / "here")]) == 1
    assert re.fullmatch(r"error: The Hub cannot be reached, .*karpathy/tinyllamas\.\n", capsys.readouterr().err)
    assert not os.listdir(tmp_path)
    assert not local_hub.requests


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_llama2c(tied: bool, tmp_path: Path):
    d_model, d_mlp, n_layers, n_heads, n_kv, d_vocab, context = 12, 20, 3, 6, 2, 17, 9
    d_head = d_model // n_heads
    random = np.random.default_rng(0)

    def weights(*shape: int) -> np.ndarray:
        return random.normal(size=shape).astype("<f4")

    names = ("embed", "norm1", "wq", "wk", "wv", "wo", "norm2", "w1", "w2", "w3", "norm", "rope", "head")
    shapes = (
        (d_vocab, d_model), (n_layers, d_model), (n_layers, d_model, d_model), (n_layers, n_kv * d_head, d_model),
        (n_layers, n_kv * d_head, d_model), (n_layers, d_model, d_model), (n_layers, d_model),
        (n_layers, d_mlp, d_model), (n_layers, d_model, d_mlp), (n_layers, d_mlp, d_model), (d_model,),
        (2, context, d_head // 2), (d_vocab, d_model),
    )  # fmt: skip
    w = {name: weights(*shape) for name, shape in zip(names, shapes, strict=True)}
    written = [w[name] for name in names if not (tied and name == "head")]
    header = struct.pack("<7i", d_model, d_mlp, n_layers, n_heads, n_kv, d_vocab if tied else -d_vocab, context)
    (tmp_path / "model.bin").write_bytes(header + b"".join(array.tobytes() for array in written))

    tokens = [1, *random.integers(0, d_vocab, context - 1).tolist()]
    with torch.no_grad():
        logits = read_model(tmp_path / "model.bin")(torch.tensor([tokens])).logits[0].numpy()
    w = {name: array.astype(np.float64) for name, array in w.items()}
    expected = _forward(w, tokens, n_layers, n_heads, n_kv, d_head) @ w["embed" if tied else "head"].T
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def _forward(
    w: dict[str, np.ndarray], tokens: list[int], n_layers: int, n_heads: int, n_kv: int, d_head: int
) -> np.ndarray:
    """The forward function of llama2.c's run.c, token by token, in float64."""

    def rms(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean() + 1e-5) * weight

    def rotate(x: np.ndarray, position: int) -> np.ndarray:
        x = x.copy()
        for i in range(0, x.size, 2):  # neighbours are rotated
            angle = position / 10000 ** (i % d_head / d_head)
            x[i], x[i + 1] = (
                x[i] * math.cos(angle) - x[i + 1] * math.sin(angle),
                x[i] * math.sin(angle) + x[i + 1] * math.cos(angle),
            )
        return x

    keys: list[list[np.ndarray]] = [[] for _ in range(n_layers)]
    values: list[list[np.ndarray]] = [[] for _ in range(n_layers)]
    outputs = []
    for position, token in enumerate(tokens):
        x = w["embed"][token]
        for layer in range(n_layers):
            normed = rms(x, w["norm1"][layer])
            query = rotate(w["wq"][layer] @ normed, position).reshape(n_heads, d_head)
            keys[layer].append(rotate(w["wk"][layer] @ normed, position).reshape(n_kv, d_head))
            values[layer].append((w["wv"][layer] @ normed).reshape(n_kv, d_head))
            heads = []
            for head in range(n_heads):
                shared = head // (n_heads // n_kv)
                scores = np.array([key[shared] @ query[head] for key in keys[layer]]) / math.sqrt(d_head)
                pattern = np.exp(scores - scores.max())
                heads.append(pattern / pattern.sum() @ np.array([value[shared] for value in values[layer]]))
            x = x + w["wo"][layer] @ np.concatenate(heads)
            normed = rms(x, w["norm2"][layer])
            gate = w["w1"][layer] @ normed
            x = x + w["w2"][layer] @ (gate / (1 + np.exp(-gate)) * (w["w3"][layer] @ normed))
        outputs.append(rms(x, w["norm"]))
    return np.array(outputs)


def test_the_converted_model_tells_the_story_that_its_author_shows(published: dict[str, bytes], tmp_path: Path):
    for name, content in published.items():
        (tmp_path / Path(name).name).write_bytes(content)
    model, tokenizer = (
        read_model(tmp_path / "stories260K.bin"),
        read_tokenizer(tmp_path / "tok512.bin", 512, 512),
    )
    tokens = torch.tensor([[tokenizer.bos_token_id]])
    for _ in range(80):
        with torch.no_grad():
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    story = tokenizer.decode(tokens[0], skip_special_tokens=True)
    assert isinstance(story, str)
    assert story.startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw "
        "a big, red ball. She wanted to play with it, but it was too high.\nLily's mom said"
    )
    assert tokenizer("Once upon a time").input_ids == [1, 403, 407, 261, 378]
    text = 'Tom said: "Ça va 🐱?"\n\nYes.'
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_files_that_are_something_else_are_named(published: dict[str, bytes], tmp_path: Path):
    model, tokens = (published[f"stories260K/{name}"] for name in ("stories260K.bin", "tok512.bin"))
    file = tmp_path / "file"
    for content, message in [
        (b"<html>", "it has 6 bytes"),
        (b"\0" * 28, "cannot be those of a model"),
        (model[:-4], "has 1056536 bytes, but the model that it describes takes 1056540"),
    ]:
        file.write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_model(file)
    for content in (b"<html>", tokens[:-1], tokens + b"\0", tokens.replace(b"<0x00>", b"<0x0O>")):
        file.write_bytes(content)
        with pytest.raises(UserError, match="does not hold 512 tokens"):
            read_tokenizer(file, 512, 512)
    file.write_text("One.\n<|endoftext|>\n\n<|endoftext|>\nTwo.\n", encoding="utf-8")
    assert split_stories(file, 2) == ["One.", "Two."]
    with pytest.raises(UserError, match="holds 2 stories; 3 are needed"):
        split_stories(file, 3)
