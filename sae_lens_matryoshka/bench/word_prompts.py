"""The language model as the absorption evaluation asks for it: prompts in, activations at the word out, each once.

SAEBench runs the same prompts for every SAE, reads a fixed token position counted from the end, and refuses prompts of
different lengths, which is what most tokenizers give. Here each prompt is read at its own end and kept.
"""

import copy
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_matryoshka.bench.evaluated_saes import Hook
from sae_lens_matryoshka.bench.models import Model
from sae_lens_matryoshka.bench.progress import progress_bar
from sae_lens_matryoshka.bench.texts_alone import activations_alone, text_tokens
from sae_lens_matryoshka.bench.upstream import vocab

FEWEST_OF_A_LETTER = 5
"""How many words of each letter a sample has, where the vocabulary has them: a probe needs some of each."""


class WordPrompts:
    """Stands in for the model where SAEBench asks for the activations of a word in a prompt.

    Args:
        model: The model.
        hook: Where to take the activations.
        position: The word's token in a prompt, counted from its end as -1, -2 and so on.
        max_words: How many words of the vocabulary to draw; None takes all of them.
        seed: The seed of that draw.
    """

    def __init__(self, model: Model, hook: Hook, position: int, max_words: int | None = None, seed: int = 42) -> None:
        self.model = model
        self.hook = hook
        self.position = position
        self.tokenizer = _OrderedTokenizer(model.tokenizer, max_words, seed)
        self.cfg = copy.copy(model.cfg)
        # SAEBench makes a folder of this name inside its own, unless it is the path of a local model
        self.cfg.model_name = "model"
        self._activations: dict[str, Float[Tensor, " d_model"]] = {}
        self._bar: Any = None

    @cached_property
    def words(self) -> list[str]:
        """The words that prompts are made of, by SAEBench's own choice from the vocabulary."""
        return vocab.get_alpha_tokens(self.tokenizer)  # type: ignore[arg-type]

    @contextmanager
    def shown(self, n_prompts: int, description: str) -> Iterator[None]:
        """Show a progress bar that moves with the prompts that are asked for meanwhile.

        Args:
            n_prompts: How many there will be.
            description: What the bar is to say.
        """
        with progress_bar(n_prompts, description, "words") as self._bar:
            yield
        self._bar = None

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
        # what comes after the word changes nothing of it
        tokens = [of_prompt[: len(of_prompt) + 1 + self.position] for of_prompt in text_tokens(self.model, new)]
        for index, activations in activations_alone(self.model, tokens, self.hook, len(prompts)):
            # a copy, since a slice would keep the whole batch
            self._activations[new[index]] = activations[-1].clone()
        activations = torch.stack([self._activations[prompt] for prompt in prompts])
        if self._bar is not None:
            self._bar.update(len(prompts))
        return None, {names_filter[0]: activations[:, None].expand(-1, abs(self.position), -1)}


class _OrderedTokenizer:
    """A tokenizer whose vocabulary comes in the order of token ids, all of it or a sample of its words.

    Fast tokenizers give it in another order each time, so what SAEBench draws from it differs whatever the seed.
    """

    def __init__(self, tokenizer: Any, max_words: int | None = None, seed: int = 42) -> None:
        self._tokenizer = tokenizer
        self._max_words = max_words
        self._seed = seed

    @cached_property
    def vocab(self) -> dict[str, int]:
        everything = dict(sorted(self._tokenizer.get_vocab().items(), key=lambda item: item[1]))
        return everything if self._max_words is None else self._sample(everything, self._max_words)

    def _sample(self, everything: dict[str, int], max_words: int) -> dict[str, int]:
        """A random sample of the words: the first few that are drawn of each letter, then others as they are drawn."""
        whole: Any = _OrderedTokenizer(self._tokenizer)
        tokens = vocab.get_alpha_tokens(whole, replace_special_chars=False)
        letters = [vocab.convert_tokens_to_string(token, whole).strip()[0].lower() for token in tokens]
        drawn = list(zip(tokens, letters, strict=True))
        random.Random(self._seed).shuffle(drawn)
        of_letter: Counter[str] = Counter()
        first: list[str] = []
        others: list[str] = []
        for token, letter in drawn:
            of_letter[letter] += 1
            (first if of_letter[letter] <= FEWEST_OF_A_LETTER else others).append(token)
        chosen = {*first, *others[: max(0, max_words - len(first))]}
        return {token: token_id for token, token_id in everything.items() if token in chosen}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)
