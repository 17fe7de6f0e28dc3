"""What every SAE and every level shares: the model's activations on labelled text, and their mean latents a text.

Activations are computed once per (model, hook, text), latents once per (SAE, activations) for all levels together.
Both go through the cache.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from sae_lens_matryoshka.bench.cache import Cache, Entry
from sae_lens_matryoshka.bench.evaluated_saes import EvaluatedSAE, Hook, SAEView, SharedEncoder
from sae_lens_matryoshka.bench.fingerprints import model_hash, package_versions, tokenizer_hash
from sae_lens_matryoshka.bench.labelled_text import Texts
from sae_lens_matryoshka.bench.models import Model, model_name_of
from sae_lens_matryoshka.bench.texts_alone import activations_alone, is_special, text_tokens
from sae_lens_matryoshka.bench.upstream import activation_collection
from sae_lens_matryoshka.errors import UserError
from sae_lens_matryoshka.saved.fingerprints import content_hash

TOKENS_A_BLOCK = 2048
"""How many tokens are encoded at a time: few enough that their latents stay in the processor's cache."""

Value = TypeVar("Value")
Other = TypeVar("Other")


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
class Split(Generic[Value]):
    """One value by class for training and one for testing."""

    train: dict[str, Value]
    test: dict[str, Value]

    def flat(self) -> dict[str, Value]:
        """As one dictionary, for the cache."""
        splits = {"train": self.train, "test": self.test}
        return {f"{name}/{label}": value for name, split in splits.items() for label, value in split.items()}

    def map(self, change: Callable[[Value], Other]) -> "Split[Other]":
        """Another value in place of each."""
        return Split(
            {label: change(value) for label, value in self.train.items()},
            {label: change(value) for label, value in self.test.items()},
        )

    @classmethod
    def of(cls, flat: Mapping[str, Value], classes: Sequence[str]) -> "Split[Value]":
        return cls(*({label: flat[f"{split}/{label}"] for label in classes} for split in ("train", "test")))


@dataclass(frozen=True)
class TextActivations:
    """The activations of the texts of one class, without padding."""

    values: Float[Tensor, "tokens d_in"]
    """One text after the other, zero at special tokens, which is how SAEBench marks what means leave out."""

    lengths: list[int]
    """How many tokens each text has, special ones included."""

    context_length: int
    """How many tokens SAEBench pads every text to."""

    @property
    def n_counted(self) -> Int[Tensor, " texts"]:
        """How many tokens of each text count in its means, by SAEBench's own test."""
        counts = self.values.sum(dim=-1) != 0
        return torch.stack([of_text.sum() for of_text in counts.split(self.lengths)])

    def padded(self) -> Float[Tensor, "texts context_length d_in"]:
        """As SAEBench wants them: zeros after the end of each text."""
        return next(self.padded_blocks(len(self.lengths)))

    def padded_blocks(self, texts_a_block: int) -> Iterator[Float[Tensor, "block context_length d_in"]]:
        """The same a few texts at a time."""
        texts: list[Tensor] = list(self.values.split(self.lengths))
        for start in range(0, len(texts), texts_a_block):
            block = pad_sequence(texts[start : start + texts_a_block], batch_first=True)
            yield pad(block, (0, 0, 0, self.context_length - block.shape[1]))

    def means(self) -> Float[Tensor, "texts d_in"]:
        """The mean of each text over the tokens that are not special, by SAEBench's own averaging."""
        blocks = self.padded_blocks(max(1, TOKENS_A_BLOCK // self.context_length))
        average = activation_collection.create_meaned_model_activations
        return torch.cat([average({"": block})[""] for block in blocks])


@dataclass(frozen=True)
class PooledLatents:
    """Mean latents a text."""

    of_texts: Split[Float[Tensor, "texts width"]]
    """Means over the tokens that are not special."""

    of_nothing: Float[Tensor, " width"]
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
        self.look_again()

    def look_again(self) -> None:
        """Name the model anew, which may have been changed since; done at the start of every evaluation.

        Raises:
            UserError: If it has weights that are not finite: SAEBench turns the numbers that follow into others.
        """
        for name, parameter in self.model.named_parameters():
            if not parameter.isfinite().all():
                raise UserError(f"{name} of {self.name} holds values that are NaN or infinite; use another model.")
        self.model_hash = model_hash(self.model)
        self.tokenizer_hash = tokenizer_hash(self.model.tokenizer)

    def check_hook(self, hook: Hook, sae: EvaluatedSAE) -> None:
        """Refuse a hook that the model has not, or whose activations are not what the SAE takes.

        Raises:
            UserError: If there is no such hook, or its activations have another width, or one more dimension for heads.
        """
        token = torch.zeros((1, 1), dtype=torch.long, device=self.device)
        n_layers = self.model.cfg.n_layers
        with torch.no_grad():
            _, cache = self.model.run_with_cache(
                token, names_filter=[hook.name], stop_at_layer=min(hook.layer + 1, n_layers)
            )
        if hook.name not in cache:
            raise UserError(
                f"hook_name={hook.name!r} is no hook of {self.name}, whose layers are 0 to {n_layers - 1}; name one "
                f"as blocks.{min(hook.layer, n_layers - 1)}.hook_resid_post."
            )
        if (head := sae.sae.cfg.metadata.hook_head_index) is not None:
            raise UserError(f"{sae} is of one attention head (hook_head_index={head}); evaluations run on whole hooks.")
        shape = list(cache[hook.name].shape[2:])
        if shape != [sae.sae.cfg.d_in]:
            raise UserError(
                f"hook_name={hook.name!r} has activations of shape {shape} a token, but {sae} takes d_in="
                f"{sae.sae.cfg.d_in}; evaluations run on hooks with one vector a token, as hook_resid_post."
            )

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def key(self, kind: str, **parts: Any) -> dict[str, Any]:
        """A cache key for something made with this model."""
        made_with = {"model": self.model_hash, "tokenizer": self.tokenizer_hash, "device": self.device.type}
        return {"kind": kind, **made_with, "packages": package_versions(), **parts}

    def of_text(self, spec: TextSpec) -> Split[TextActivations]:
        """Activations at the hook by class, each text's as the model gives it that text alone.

        Raises:
            UserError: If a text has no token of its own.
        """
        entry = self.cache.get_or_compute(
            self.key("activations of texts alone", **spec.key), lambda: self._compute_activations(spec)
        )
        lengths = entry.values["lengths"]
        activations = {
            name: TextActivations(values.to(self.device), lengths[name], spec.context_length)
            for name, values in entry.tensors.items()
        }
        return Split.of(activations, list(spec.train))

    def pooled_latents(self, spec: TextSpec, view: SAEView, level: int | None) -> PooledLatents:
        """Mean latents of a level, by SAEBench's own averaging; computed for all levels of the SAE together."""
        encoder = SharedEncoder(view)

        def compute() -> Entry:
            activations = self.of_text(spec).flat()
            pooled = {name: _mean_latents(of_class, encoder) for name, of_class in activations.items()}
            some = next(iter(activations.values())).values
            with torch.no_grad():
                nothing = encoder.encode(torch.zeros_like(some[:1]))[0]
            return Entry({**pooled, "nothing": nothing})

        key = self.key("mean latents of texts alone", **spec.key, sae=view.hash)
        entry = self.cache.get_or_compute(key, compute)
        tensors = {name: encoder.of_level(latents.to(self.device), level) for name, latents in entry.tensors.items()}
        return PooledLatents(Split.of(tensors, list(spec.train)), tensors["nothing"])

    def _compute_activations(self, spec: TextSpec) -> Entry:
        tokens = {
            name: text_tokens(self.model, texts, spec.context_length)
            for name, texts in Split(spec.train, spec.test).flat().items()
        }
        places = [(name, index) for name, texts in tokens.items() for index in range(len(texts))]
        special = {(name, index): is_special(self.model, tokens[name][index]) for name, index in places}
        for (name, index), of_text in special.items():
            if of_text.all():
                split, _, label = name.partition("/")
                text = getattr(spec, split)[label][index]
                raise UserError(
                    f"The {split} text {text[:40]!r} of class {label!r} is nothing but special tokens to the model; "
                    "remove it."
                )
        found: dict[tuple[str, int], Tensor] = {}
        texts = [tokens[name][index] for name, index in places]
        for number, activations in activations_alone(self.model, texts, spec.hook, spec.batch_size, "reading texts"):
            check_finite_activations(activations, spec.hook, self)
            found[places[number]] = activations.masked_fill(special[places[number]][:, None], 0)
        return Entry(
            {name: torch.cat([found[name, index] for index in range(len(texts))]) for name, texts in tokens.items()},
            {"lengths": {name: [len(text) for text in texts] for name, texts in tokens.items()}},
        )


def check_finite_activations(activations: Tensor, hook: Hook, source: ActivationSource) -> None:
    """Refuse activations that have overflowed: SAEBench turns the numbers that follow into others.

    Raises:
        UserError: If there are NaN or infinite ones.
    """
    if not activations.isfinite().all():
        raise UserError(
            f"Activations of {source.name} at {hook.name} are NaN or infinite in {source.dtype}; use a data type of "
            f"more range, as --dtype float32."
        )


def _mean_latents(activations: TextActivations, encoder: SharedEncoder) -> Float[Tensor, "texts columns"]:
    average = activation_collection.get_sae_meaned_activations
    blocks = activations.padded_blocks(max(1, TOKENS_A_BLOCK // activations.context_length))
    tokens_only = _TokensOnly(encoder)
    return torch.cat([average({"": block}, tokens_only, len(block))[""] for block in blocks])


class _TokensOnly:
    """An encoder that leaves out special tokens and padding, which do not count in SAEBench's means."""

    def __init__(self, encoder: SharedEncoder) -> None:
        self.encoder = encoder
        self.dtype = encoder.view.dtype

    def encode(self, x: Float[Tensor, "texts context d_in"]) -> Float[Tensor, "texts context columns"]:
        counts = x.sum(dim=-1) != 0  # SAEBench's own test
        encoded = self.encoder.encode(x[counts])
        latents = encoded.new_zeros(*x.shape[:2], encoded.shape[-1])
        latents[counts] = encoded
        return latents
