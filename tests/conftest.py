"""Shared by all tests: no network, the TinyStories model and text, and a small Matryoshka SAE."""

import os
import signal
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # several processes test at once

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # as in a job in the background of a shell; child processes would ignore Ctrl-C too, which tests send them
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch

from sae_lens_matryoshka import MatryoshkaJumpReLUSAE, MatryoshkaJumpReLUSAEConfig

TINYSTORIES = Path(__file__).parents[2] / "shared" / "tinystories"


@pytest.fixture(scope="session")
def tinystories() -> Path:
    """The folder of the TinyStories model and text."""
    if not TINYSTORIES.is_dir():
        pytest.skip(f"the TinyStories model and text are not at {TINYSTORIES}")
    return TINYSTORIES


def real_model(name: str) -> Path:
    """The folder of a real language model, or the test is skipped."""
    folder = Path(os.environ.get("REAL_MODELS", "~/.cache/real-models")).expanduser() / name
    if not folder.is_dir():
        pytest.skip(f"the real model is not at {folder}; REAL_MODELS names another folder")
    return folder


@pytest.fixture
def matryoshka_sae() -> MatryoshkaJumpReLUSAE:
    """An SAE with random parameters, a threshold a latent and levels 1, 3, 8 and 20 wide."""
    return random_matryoshka_sae([1, 3, 8, 20])


def random_matryoshka_sae(widths: list[int], d_in: int = 6, seed: int = 0, **cfg: Any) -> MatryoshkaJumpReLUSAE:
    torch.manual_seed(seed)
    sae = MatryoshkaJumpReLUSAE(MatryoshkaJumpReLUSAEConfig(d_in, widths[-1], matryoshka_widths=widths, **cfg))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_()
        sae.threshold.abs_()
    return sae
