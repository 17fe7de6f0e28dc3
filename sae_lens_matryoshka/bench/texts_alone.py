"""The model's activations on texts, each text's being those that the model gives it alone.

Texts that share a batch differ in length. Gemma's tokenizer pads on the left: run like that and without a mask, a text
attends to its padding and starts at a wrong position. So a text is tokenized by itself, padding comes after it and is
masked, and texts of like length share a batch.
"""

import itertools
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sae_lens_matryoshka.bench.evaluated_saes import Hook
from sae_lens_matryoshka.bench.models import Model
from sae_lens_matryoshka.bench.progress import progress_bar
from sae_lens_matryoshka.errors import UserError
from sae_lens_matryoshka.text.token_data import vocabulary_size

TextTokens = Int[Tensor, " tokens"]
"""The tokens of one text."""


def text_tokens(model: Model, texts: Sequence[str], max_length: int | None = None) -> list[TextTokens]:
    """The tokens of each text alone: its own, after one BOS if the model's tokenizer has one.

    So it is with and without a tokenizer that adds a BOS, and with texts that begin with its name. A model whose
    ``default_prepend_bos`` is off gets none.

    Args:
        model: The model.
        texts: The texts.
        max_length: How many tokens to keep at most, BOS included; None keeps all.

    Raises:
        UserError: If a text has a token that the model has no embedding for.
    """
    if not texts:
        return []
    tokenizer = model.tokenizer
    assert tokenizer is not None
    prefix = [tokenizer.bos_token_id] if model.cfg.default_prepend_bos and tokenizer.bos_token_id is not None else []
    rows: list[TextTokens] = []
    for tokens in tokenizer(list(texts), add_special_tokens=False)["input_ids"]:  # type: ignore[union-attr]
        own = list(itertools.dropwhile(lambda token: token == tokenizer.bos_token_id, tokens))
        rows.append(torch.tensor([*prefix, *own][:max_length], device=next(model.parameters()).device))
    size = vocabulary_size(model)
    for text, row in zip(texts, rows, strict=True):
        if size is not None and len(row) > 0 and (largest := int(row.max())) >= size:
            raise UserError(
                f"The text {text[:40]!r} has the token {tokenizer.convert_ids_to_tokens(largest)!r} ({largest}), but "
                f"the model has embeddings for {size} tokens only: the tokenizer is not this model's, or the text "
                f"names its special tokens."
            )
    return rows


def is_special(model: Model, tokens: Int[Tensor, "*any"]) -> Bool[Tensor, "*any"]:
    """Which tokens are BOS, EOS or padding, which SAEBench leaves out of means."""
    tokenizer = model.tokenizer
    ids = [getattr(tokenizer, f"{kind}_token_id", None) for kind in ("bos", "eos", "pad")]
    return torch.isin(tokens, torch.tensor([token_id for token_id in ids if token_id is not None]).to(tokens))


@torch.no_grad()
def activations_alone(
    model: Model, texts: Sequence[TextTokens], hook: Hook, batch_size: int, description: str | None = None
) -> Iterator[tuple[int, Float[Tensor, "tokens d_in"]]]:
    """The activations of each text, as if it had been run by itself.

    Args:
        model: The model.
        texts: The tokens of each text.
        hook: Where to take the activations.
        batch_size: How many texts to run together.
        description: What a progress bar is to say; None shows none.

    Yields:
        The index of a text and its activations, shortest texts first.
    """
    by_length = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    bar = progress_bar(sum(map(len, texts)), description, "tokens") if description else None
    for start in range(0, len(by_length), batch_size):
        indices = by_length[start : start + batch_size]
        tokens = pad_sequence([texts[index] for index in indices], batch_first=True)
        mask = pad_sequence([torch.ones_like(texts[index]) for index in indices], batch_first=True)
        # a mask of our own also keeps TransformerLens from guessing the padding by the tokenizer's side and pad token
        _, cache = model.run_with_cache(
            tokens, names_filter=[hook.name], stop_at_layer=hook.layer + 1, prepend_bos=False, attention_mask=mask
        )
        for index, activations in zip(indices, cache[hook.name], strict=True):
            yield index, activations[: len(texts[index])]
        if bar is not None:
            bar.update(sum(len(texts[index]) for index in indices))
    if bar is not None:
        bar.close()
