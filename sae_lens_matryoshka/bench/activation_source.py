"""What every SAE and every level shares: the model's activations on labelled text, and their mean latents a text.

Activations are computed once per (model, hook, text), latents once per (SAE, activations) for all levels together.
Both go through the cache.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_matryoshka.bench.cache import Cache, Entry, content_hash, module_hash
from sae_lens_matryoshka.bench.evaluated_saes import Hook, SAEView, SharedEncoder
from sae_lens_matryoshka.bench.labelled_text import Texts
from sae_lens_matryoshka.bench.models import Model, model_name_of
from sae_lens_matryoshka.bench.upstream import activation_collection, dataset_utils

TOKENS_A_BLOCK = 2048
"""How many tokens are encoded at a time: few enough that their latents stay in the processor's cache."""


@dataclass(frozen=True)
class TextSpec:
    """Which activations: everything they depend on but the model."""

    train: Texts
    test: Texts
    hook: Hook
    context_length: int
    batch_size: int

    @property
    def key(self) -> dict[str, Any]:
        texts = content_hash([self.train, self.test])
        return {"texts": texts, "hook": self.hook.name, "context_length": self.context_length}


@dataclass(frozen=True)
class Split:
    """One value by class for training and one for testing."""

    train: dict[str, Tensor]
    test: dict[str, Tensor]

    def flat(self) -> dict[str, Tensor]:
        """As one dictionary, for the cache."""
        return {f"train/{label}": tensor for label, tensor in self.train.items()} | {
            f"test/{label}": tensor for label, tensor in self.test.items()
        }

    @classmethod
    def of(cls, flat: Mapping[str, Tensor], classes: Sequence[str]) -> "Split":
        return cls(
            {label: flat[f"train/{label}"] for label in classes}, {label: flat[f"test/{label}"] for label in classes}
        )


@dataclass(frozen=True)
class PooledLatents:
    """Mean latents a text, of all levels side by side; see :class:`SharedEncoder`."""

    of_texts: Split
    """Class -> (texts, columns): means over the tokens that are not special."""

    of_nothing: Float[Tensor, " columns"]
    """Latents at a zero vector, which stands at special tokens."""


class ActivationSource:
    """Activations of one model, each computed once.

    Args:
        model: The model.
        cache: Where to keep them; None keeps them in memory.
    """

    def __init__(self, model: Model, cache: Cache | None = None) -> None:
        self.model = model
        self.cache = cache if cache is not None else Cache()
        self.name = model_name_of(model)
        self.hash = module_hash(model)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def key(self, kind: str, **parts: Any) -> dict[str, Any]:
        """A cache key for something made with this model."""
        return {"kind": kind, "model": self.hash, "model_name": self.name, **parts}

    def of_text(self, spec: TextSpec) -> Split:
        """Activations at the hook, class -> (texts, tokens, d_in), zero at special tokens, as SAEBench takes them."""

        def compute() -> Entry:
            splits: list[dict[str, Tensor]] = []
            for texts in (spec.train, spec.test):
                tokens = dataset_utils.tokenize_data_dictionary(
                    texts,
                    self.model.tokenizer,  # type: ignore[arg-type]
                    spec.context_length,
                    str(self.device),
                )
                splits.append(
                    activation_collection.get_all_llm_activations(
                        tokens,
                        self.model,  # type: ignore[arg-type]
                        spec.batch_size,
                        spec.hook.layer,
                        spec.hook.name,
                        mask_bos_pad_eos_tokens=True,
                    )
                )
            return Entry(Split(*splits).flat())

        entry = self.cache.get_or_compute(self.key("activations", **spec.key), compute)
        tensors = {name: tensor.to(self.device) for name, tensor in entry.tensors.items()}
        return Split.of(tensors, list(spec.train))

    def pooled_latents(self, spec: TextSpec, view: SAEView) -> PooledLatents:
        """Mean latents of all levels of an SAE, class -> (texts, columns), by SAEBench's own averaging."""
        encoder = SharedEncoder(view)

        def compute() -> Entry:
            activations = self.of_text(spec)
            texts_a_block = max(1, TOKENS_A_BLOCK // spec.context_length)
            pooled = Split(
                *(
                    activation_collection.get_sae_meaned_activations(split, encoder, texts_a_block)
                    for split in (activations.train, activations.test)
                )
            )
            some = next(iter(activations.train.values()))
            with torch.no_grad():
                nothing = encoder.encode(torch.zeros_like(some[:1, 0]))[0]
            return Entry({**pooled.flat(), "nothing": nothing})

        key = self.key("mean latents", **spec.key, sae=view.hash)
        entry = self.cache.get_or_compute(key, compute)
        tensors = {name: tensor.to(self.device) for name, tensor in entry.tensors.items()}
        return PooledLatents(Split.of(tensors, list(spec.train)), tensors["nothing"])
