"""The language model as the absorption evaluation asks for it: prompts in, activations at the word out, each once.

SAEBench runs the same prompts for every SAE, reads a fixed token position counted from the end, and refuses prompts of
different lengths, which is what most tokenizers give. Here each prompt is read at its own end and kept.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_matryoshka.bench.evaluated_saes import Hook
from sae_lens_matryoshka.bench.models import Model
from sae_lens_matryoshka.bench.texts_alone import activations_alone, text_tokens


class WordPrompts:
    """Stands in for the model where SAEBench asks for the activations of a word in a prompt.

    Args:
        model: The model.
        hook: Where to take the activations.
        position: The word's token in a prompt, counted from its end as -1, -2 and so on.
    """

    def __init__(self, model: Model, hook: Hook, position: int) -> None:
        self.model = model
        self.hook = hook
        self.position = position
        self.tokenizer = _OrderedTokenizer(model.tokenizer)
        self.cfg = copy.copy(model.cfg)
        # SAEBench makes a folder of this name inside its own, unless it is the path of a local model
        self.cfg.model_name = "model"
        self._activations: dict[str, Float[Tensor, " d_model"]] = {}

    def to_tokens(self, prompt: str) -> Tensor:
        """One token, whatever the prompt: SAEBench asks only to compare lengths, which need not agree here."""
        return torch.zeros((1, 1), dtype=torch.long)

    def run_with_cache(
        self, prompts: Sequence[str], names_filter: Sequence[str]
    ) -> tuple[None, dict[str, Float[Tensor, "prompts positions d_model"]]]:
        """Activations at the word, under the name asked for; every position of a prompt holds those of its word.

        Args:
            prompts: The prompts.
            names_filter: The hook that SAEBench builds from the layer, ``blocks.<layer>.hook_resid_post``.
        """
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._activations]
        tokens = text_tokens(self.model, new)
        for index, activations in activations_alone(self.model, tokens, self.hook, len(prompts)):
            # a copy, since a slice would keep the whole batch
            self._activations[new[index]] = activations[self.position].clone()
        activations = torch.stack([self._activations[prompt] for prompt in prompts])
        return None, {names_filter[0]: activations[:, None].expand(-1, abs(self.position), -1)}


class _OrderedTokenizer:
    """A tokenizer whose vocabulary comes in the order of token ids.

    Fast tokenizers give it in another order each time, so what SAEBench draws from it differs whatever the seed.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @property
    def vocab(self) -> dict[str, int]:
        return dict(sorted(self._tokenizer.get_vocab().items(), key=lambda item: item[1]))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)
