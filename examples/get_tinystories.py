"""Make the folder that the README calls ``$TINYSTORIES``: a 260k-parameter language model and the stories it knows.

    python examples/get_tinystories.py tinystories && export TINYSTORIES=$PWD/tinystories

downloads 20 MB from the Hugging Face Hub and writes ``model/`` in Hugging Face's format, ``data/train.jsonl`` and
``data/validation.jsonl``. The model is karpathy/tinyllamas's stories260K (MIT), published in llama2.c's format, which
is converted; the text is the beginning of the validation split of roneneldan/TinyStories (CDLA-Sharing-1.0), which the
model has not seen in training.

``tests/hub/test_get_tinystories.py`` runs all of this on the very bytes of the published model and tokenizer, from a
Hub on the same machine. It has not been tried against huggingface.co itself, nor on the whole file of stories.
"""

import argparse
import json
import struct
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sae_lens_matryoshka.errors import UserError
from sae_lens_matryoshka.saved.hub_errors import hub_errors

MODEL_REPOSITORY = "karpathy/tinyllamas"
MODEL_REVISION = "0bd21da7698eaf29a0d7de3992de8a46ef624add"
TEXT_REPOSITORY = "roneneldan/TinyStories"
STORIES = {"train": 909, "validation": 101}

UNKNOWN, BOS, EOS = "<unk>", "<s>", "</s>"
N_SPECIAL, N_BYTES = 3, 256


def main(arguments: Sequence[str] | None = None) -> int:
    """Download, convert, write; the exit code says whether that went well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder to make")
    folder: Path = parser.parse_args(arguments).folder
    try:
        if folder.exists():
            raise UserError(f"{folder} is there already; remove it, or give the name of another folder.")
        with hub_errors(MODEL_REPOSITORY):
            checkpoint, tokens = (
                hf_hub_download(MODEL_REPOSITORY, f"stories260K/{name}", revision=MODEL_REVISION)
                for name in ("stories260K.bin", "tok512.bin")
            )
        with hub_errors(TEXT_REPOSITORY):
            text = hf_hub_download(TEXT_REPOSITORY, "TinyStories-valid.txt", repo_type="dataset")
        write_folder(folder, Path(checkpoint), Path(tokens), Path(text))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"Saved to {folder}")
    return 0


def write_folder(folder: Path, checkpoint: Path, tokens: Path, text: Path) -> None:
    """Write model, tokenizer and stories into a new folder, which appears once it is complete.

    Args:
        folder: The folder to make.
        checkpoint: The model, see :func:`read_model`.
        tokens: The vocabulary, see :func:`read_tokenizer`.
        text: The stories, see :func:`split_stories`.

    Raises:
        UserError: If a file is not what it should be.
    """
    model = read_model(checkpoint)
    tokenizer = read_tokenizer(tokens, model.config.vocab_size, model.config.max_position_embeddings)
    stories = split_stories(text, sum(STORIES.values()))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}-", dir=folder.parent) as scratch:
        unfinished = Path(scratch, folder.name)
        model.save_pretrained(unfinished / "model")
        tokenizer.save_pretrained(unfinished / "model")
        (unfinished / "data").mkdir()
        for split, count in STORIES.items():
            rows = [json.dumps({"text": story}, ensure_ascii=False) + "\n" for story in stories[:count]]
            (unfinished / "data" / f"{split}.jsonl").write_text("".join(rows), encoding="utf-8")
            stories = stories[count:]
        unfinished.rename(folder)


def read_model(path: Path) -> LlamaForCausalLM:
    """Read a checkpoint in llama2.c's first format (``legacy_export`` in its export.py).

    Seven int32 (d_model, width of the MLP, layers, heads, key-value heads, vocabulary, context; the vocabulary is
    negative if the unembedding is not the embedding), then the weights in float32, each kind for all layers together.

    Raises:
        UserError: If the file's size is not what its first numbers say.
    """
    content = path.read_bytes()
    if len(content) < 28:
        raise UserError(f"{path} is no llama2.c checkpoint: it has {len(content)} bytes.")
    d_model, d_mlp, n_layers, n_heads, n_kv_heads, d_vocab, context = struct.unpack_from("<7i", content)
    tied, d_vocab = d_vocab > 0, abs(d_vocab)
    if min(d_model, d_mlp, n_layers, n_heads, n_kv_heads, d_vocab, context) < 1 or d_model % n_heads:
        raise UserError(f"{path} is no llama2.c checkpoint: its first seven numbers cannot be those of a model.")
    d_head = d_model // n_heads
    d_kv = n_kv_heads * d_head
    layer = "model.layers.{}."
    layout: list[tuple[str | None, tuple[int, ...]]] = [
        ("model.embed_tokens", (d_vocab, d_model)),
        (layer + "input_layernorm", (n_layers, d_model)),
        (layer + "self_attn.q_proj", (n_layers, d_model, d_model)),
        (layer + "self_attn.k_proj", (n_layers, d_kv, d_model)),
        (layer + "self_attn.v_proj", (n_layers, d_kv, d_model)),
        (layer + "self_attn.o_proj", (n_layers, d_model, d_model)),
        (layer + "post_attention_layernorm", (n_layers, d_model)),
        (layer + "mlp.gate_proj", (n_layers, d_mlp, d_model)),
        (layer + "mlp.down_proj", (n_layers, d_model, d_mlp)),
        (layer + "mlp.up_proj", (n_layers, d_mlp, d_model)),
        ("model.norm", (d_model,)),
        (None, (2, context, d_head // 2)),  # cosines and sines of the rotations, which transformers computes
        *([] if tied else [("lm_head", (d_vocab, d_model))]),
    ]
    expected = 28 + 4 * sum(int(np.prod(shape)) for _, shape in layout)
    if len(content) != expected:
        raise UserError(f"{path} has {len(content)} bytes, but the model that it describes takes {expected}.")

    values = torch.from_numpy(np.frombuffer(content, "<f4", offset=28).astype(np.float32))
    state: dict[str, torch.Tensor] = {}
    for name, shape in layout:
        size = int(np.prod(shape))
        weights, values = values[:size].view(shape), values[size:]
        if name is None:
            continue
        if not name.startswith(layer):
            state[f"{name}.weight"] = weights
            continue
        for index in range(n_layers):
            rotated = name.endswith(("q_proj", "k_proj"))
            state[f"{name.format(index)}.weight"] = _halves(weights[index], d_head) if rotated else weights[index]
    if tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]

    config = LlamaConfig(
        vocab_size=d_vocab,
        hidden_size=d_model,
        intermediate_size=d_mlp,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=n_kv_heads,
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(state)
    return model


def _halves(weight: torch.Tensor, d_head: int) -> torch.Tensor:
    """Reorder the rows of each head: llama2.c rotates neighbours, transformers one half of a head against the other."""
    return weight.view(-1, d_head // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def read_tokenizer(path: Path, vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    """Read a vocabulary as llama2.c's tokenizer.py exports it from SentencePiece's BPE with bytes to fall back to.

    An int32, the length of the longest token, then for each token its score in float32, its length in int32 and its
    bytes in UTF-8. The three special tokens come first, then those of the 256 bytes, then all others, with a space for
    SentencePiece's ``▁``; the lower a score, the later a token is merged.

    Args:
        path: The file.
        vocab_size: The number of tokens.
        context: The length of the model's context.

    Returns:
        A tokenizer that puts one BOS in front.

    Raises:
        UserError: If the file does not hold so many tokens, or does not begin with those.
    """
    content = path.read_bytes()
    pieces: list[str] = []
    scores: list[float] = []
    offset = 4
    try:
        for _ in range(vocab_size):
            score, length = struct.unpack_from("<fi", content, offset)
            offset += 8 + length
            pieces.append(content[offset - length : offset].decode("utf-8").replace(" ", "▁"))
            scores.append(score)
    except (struct.error, UnicodeDecodeError) as error:
        raise UserError(f"{path} does not hold {vocab_size} tokens in llama2.c's format.") from error
    first = [UNKNOWN, f"\n{BOS}\n", f"\n{EOS}\n", *(f"<0x{byte:02X}>" for byte in range(N_BYTES))]
    if offset != len(content) or pieces[: N_SPECIAL + N_BYTES] != first:
        raise UserError(f"{path} does not hold {vocab_size} tokens in llama2.c's format.")
    pieces[:N_SPECIAL] = UNKNOWN, BOS, EOS

    ids = {piece: index for index, piece in enumerate(pieces)}
    merges: list[tuple[str, str]] = []
    for index in sorted(range(N_SPECIAL + N_BYTES, vocab_size), key=lambda index: -scores[index]):
        cuts = [(pieces[index][:cut], pieces[index][cut:]) for cut in range(1, len(pieces[index]))]
        known = [(left, right) for left, right in cuts if left in ids and right in ids]
        merges += sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token=UNKNOWN, fuse_unk=True, byte_fallback=True))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in (UNKNOWN, BOS, EOS)])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])  # type: ignore[reportAttributeAccessIssue]
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[reportAttributeAccessIssue]
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 1)]
    )
    tokenizer.decoder = decoders.Sequence(  # type: ignore[reportAttributeAccessIssue]
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=context,
    )


def split_stories(path: Path, count: int) -> list[str]:
    """Read the first stories of a file in which ``<|endoftext|>`` stands between two.

    Raises:
        UserError: If there are fewer.
    """
    stories = [story.strip() for story in path.read_text(encoding="utf-8").split("<|endoftext|>")]
    stories = [story for story in stories if story][:count]
    if len(stories) < count:
        raise UserError(f"{path} holds {len(stories)} stories; {count} are needed.")
    return stories


if __name__ == "__main__":
    sys.exit(main())
