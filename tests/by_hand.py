"""The reference for SAEs in models: activations that plain PyTorch hooks replace in the Hugging Face model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import PreTrainedModel

from sae_lens_matryoshka import MatryoshkaSAE
from tests.conftest import random_matryoshka_sae

WIDTHS = [8, 32, 128]
TOKENS = torch.randint(3, 500, (2, 12), generator=torch.Generator().manual_seed(0))


def sae_at(hook_name: str, d_in: int = 64, seed: int = 0) -> MatryoshkaSAE:
    """An SAE whose reconstruction has about the size of its input, and nothing else to do with it."""
    sae = random_matryoshka_sae(WIDTHS, d_in, seed)
    with torch.no_grad():
        sae.W_enc.div_(d_in**0.5)
        sae.W_dec.div_(WIDTHS[-1] ** 0.5)
    sae.cfg.metadata.hook_name = hook_name
    return sae


@contextmanager
def _replaced(module: nn.Module, by: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Another output of a Hugging Face module, whose first element is the activation if it is a tuple."""

    def replace(_: nn.Module, __: Any, output: Any) -> Any:
        return (by(output[0]), *output[1:]) if isinstance(output, tuple) else by(output)

    handle = module.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def by_hand_in(model: PreTrainedModel, module: str, by: Callable[[Tensor], Tensor]) -> Tensor:
    with _replaced(model.get_submodule(module), by):
        return model(TOKENS).logits


def assert_equal_and_changed(logits: Any, by_hand: Tensor, unchanged: Tensor) -> None:
    assert_close(logits, by_hand, rtol=1e-4, atol=1e-4)
    assert (logits - unchanged).abs().max() > 1e-2
