"""What a user could train instead: each contender makes one full training step at a given shape."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from types import ModuleType
from typing import Any

import torch
from sae_lens import JumpReLUTrainingSAE, SAETrainer, StandardTrainingSAE, TrainingSAE
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor

from sae_lens_matryoshka import MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig, geometric_widths, paper_widths
from sae_lens_matryoshka.training.fused_adam import fuse_adam

Step = Callable[[Tensor], None]


@dataclass(frozen=True)
class Shape:
    """The size of a training step."""

    d_in: int
    d_sae: int
    batch: int
    k: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """Read ``d_in/d_sae/batch/k``."""
        return cls(*(int(part) for part in text.split("/")))

    def __str__(self) -> str:
        return f"{self.d_in}/{self.d_sae}/{self.batch}/{self.k}"


@dataclass(frozen=True)
class Options:
    """How a contender trains."""

    n_levels: int = 5
    dead_share: float = 0.0
    device: str = "cpu"
    autocast: bool = False
    prefix_sampling: dict[str, Any] | None = None
    sparse: bool = False
    """Whether JumpReLU and ReLU SAEs fire k latents a sample, as when trained, rather than half of all."""


ARCHITECTURES = {
    "ours": "matryoshka",
    "ours, SAELens's Adam": "matryoshka",
    "SAELens matryoshka": "matryoshka_batchtopk",
    "SAELens matryoshka, compiled": "matryoshka_batchtopk",
    "ours topk": "matryoshka_topk",
    "ours jumprelu": "matryoshka_jumprelu",
    "ours standard": "matryoshka_standard",
    "SAELens batchtopk": "batchtopk",
    "SAELens topk": "topk",
    "SAELens jumprelu": "jumprelu",
    "SAELens standard": "standard",
}
"""The architectures in SAELens's registry, by contender."""


def contender(name: str, shape: Shape, options: Options) -> Step:
    """One full step of a contender, as SAELens's trainer does it: forward, backward, clipping, Adam, statistics.

    Args:
        name: One of :data:`ARCHITECTURES`, ``dictionary_learning``, or ``encoder product``, the floor.
        shape: The size of the step.
        options: How to train.
    """
    torch.manual_seed(0)
    if name == "encoder product":
        W_enc = torch.randn(shape.d_in, shape.d_sae, device=options.device)

        def product(x: Tensor) -> None:
            with torch.autocast(options.device, torch.bfloat16, enabled=options.autocast):
                torch.mm(x, W_enc)

        return product
    if name == "dictionary_learning":
        return _dictionary_learning(shape, options)
    if name not in ARCHITECTURES:
        raise ValueError(f"There is no contender called {name!r}.")
    sae_class, config_class = SAE_TRAINING_CLASS_REGISTRY[ARCHITECTURES[name]]
    wanted: dict[str, Any] = {
        "d_in": shape.d_in,
        "d_sae": shape.d_sae,
        "k": shape.k,
        "matryoshka_widths": level_widths(shape.d_sae, options.n_levels),
        "prefix_sampling": options.prefix_sampling,
    }
    sae: TrainingSAE[Any] = sae_class(
        config_class(**{f.name: wanted[f.name] for f in fields(config_class) if f.name in wanted})
    )
    if options.sparse:
        make_sparse(sae, shape)
    sae.to(options.device)
    trainer = SAETrainer(
        SAETrainerConfig(10**9, shape.batch, lr=1e-4, lr_end=1e-4, device=options.device, autocast=options.autocast),
        sae,
        iter(()),
    )
    if name.startswith("ours") and "SAELens" not in name:
        fuse_adam(trainer)
    if name.endswith("compiled"):  # as SAELens's runner does it
        sae.training_forward_pass = torch.compile(sae.training_forward_pass)  # type: ignore[method-assign]
    dead = torch.randperm(shape.d_sae, device=options.device)[: int(options.dead_share * shape.d_sae)]

    def step(x: Tensor) -> None:
        if len(dead):
            trainer.n_forward_passes_since_fired[dead] = 10**6
        trainer.step(x)
        trainer.n_training_steps += 1

    return step


def forward_backward(shape: Shape, options: Options) -> Step:
    """Our forward and backward pass alone, without what the trainer does around it."""
    torch.manual_seed(0)
    widths = level_widths(shape.d_sae, options.n_levels)
    cfg = MatryoshkaTrainingSAEConfig(shape.d_in, shape.d_sae, k=shape.k, matryoshka_widths=widths)
    sae = MatryoshkaTrainingSAE(cfg).to(options.device)

    def step(x: Tensor) -> None:
        sae.zero_grad()
        with torch.autocast(options.device, torch.bfloat16, enabled=options.autocast):
            output = sae.training_forward_pass(TrainStepInput(x, {}, None, 0, False))
        output.loss.backward()

    return step


@torch.no_grad()
def make_sparse(sae: TrainingSAE[Any], shape: Shape) -> None:
    """Make an SAE with thresholds fire k latents a sample on the benchmark's data."""
    if not isinstance(sae, JumpReLUTrainingSAE | StandardTrainingSAE):
        return
    hidden_pre = batches(shape, 1, "cpu")[0][:256] @ sae.W_enc
    threshold = hidden_pre.flatten().topk(256 * shape.k).values[-1]
    if isinstance(sae, JumpReLUTrainingSAE):
        sae.threshold.fill_(threshold)
    else:
        sae.b_enc.fill_(-threshold)


def level_widths(d_sae: int, n_levels: int) -> list[int]:
    """The paper's five levels, or as many of equal size."""
    if n_levels == 5:
        return paper_widths(d_sae)
    if n_levels == 2:
        return geometric_widths(d_sae, 2)
    return [d_sae * (level + 1) // n_levels for level in range(n_levels)]


def batches(shape: Shape, n: int, device: str) -> list[Tensor]:
    """Sparse combinations of fixed directions, as model activations are thought to be."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(4 * shape.d_in, shape.d_in, generator=generator)
    made: list[Tensor] = []
    for _ in range(n):
        coefficients = torch.rand(shape.batch, 4 * shape.d_in, generator=generator)
        made.append((coefficients.mul_(coefficients > 0.95) @ directions).to(device))
    return made


def _dictionary_learning(shape: Shape, options: Options) -> Step:
    """saprmarks/dictionary_learning's Matryoshka trainer (``pip install --no-deps dictionary-learning``).

    It imports nnsight, a dependency that training on given activations never uses; an empty module stands in.
    """
    nnsight = ModuleType("nnsight")
    nnsight.LanguageModel = object  # type: ignore[attr-defined]
    sys.modules.setdefault("nnsight", nnsight)
    from dictionary_learning.trainers.matryoshka_batch_top_k import (  # type: ignore[import-not-found]
        MatryoshkaBatchTopKTrainer,
    )

    trainer = MatryoshkaBatchTopKTrainer(
        steps=10**9,
        activation_dim=shape.d_in,
        dict_size=shape.d_sae,
        k=shape.k,
        layer=0,
        lm_name="none",
        group_fractions=[1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2 + 1 / 32],
        lr=1e-4,
        warmup_steps=0,
        device=options.device,
    )
    n_steps = 0

    def step(x: Tensor) -> None:
        nonlocal n_steps
        trainer.update(n_steps, x)
        n_steps += 1

    return step
