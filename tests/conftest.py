"""Shared by all tests: no network, the TinyStories model and text, and a small Matryoshka SAE."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # several processes test at once

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # as in a job in the background of a shell; child processes would ignore Ctrl-C too, which tests send them
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import sae_lens
import torch
from sae_lens import HookedSAETransformer
from transformer_lens import HookedTransformerConfig
from transformers import AutoModelForCausalLM, PreTrainedModel

from sae_lens_matryoshka import MatryoshkaJumpReLUSAE, MatryoshkaJumpReLUSAEConfig

SLOWEST_FIRST = [
    "test_real_gemma.py",
    "test_real_run.py",
    "test_readme.py",
    "test_runner.py",
    "test_killed_runs.py",
    "test_examples.py",
]
"""Files that take long for few tests; begun last, one of them would keep a single process busy at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give pytest-xdist the slowest files first, which it hands out in this order."""
    places = {name: place for place, name in enumerate(SLOWEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


TINYSTORIES = Path(__file__).parents[2] / "shared" / "tinystories"


@pytest.fixture(scope="session")
def tinystories() -> Path:
    """The folder of the TinyStories model and text."""
    if not TINYSTORIES.is_dir():
        pytest.skip(f"the TinyStories model and text are not at {TINYSTORIES}")
    return TINYSTORIES


REAL_MODELS = Path(__file__).parents[2] / "shared" / "real-models"


def real_model(name: str) -> Path:
    """The folder of a real language model, fetched once a machine where the script for that is; else a skipped test."""
    folder = Path(os.environ.get("REAL_MODELS", "~/.cache/real-models")).expanduser()
    why = "REAL_MODELS names another folder"
    if not (folder / name).is_dir() and "REAL_MODELS" not in os.environ and (REAL_MODELS / "get-models").is_file():
        environment = {**os.environ, "PYTHON": sys.executable}
        fetched = subprocess.run([REAL_MODELS / "get-models"], env=environment, capture_output=True, text=True)
        why = f"get-models says {fetched.stderr.strip()[-300:]!r}"
    if not (folder / name).is_dir():
        pytest.skip(f"the real model is not at {folder / name}; {why}")
    return folder / name


def real_text(name: str) -> Path:
    """A file of text for real language models, or the test is skipped."""
    if not (REAL_MODELS / name).is_file():
        pytest.skip(f"the text for real models is not at {REAL_MODELS / name}")
    return REAL_MODELS / name


@pytest.fixture(scope="module")
def hugging_face(tinystories: Path) -> PreTrainedModel:
    """The TinyStories model itself."""
    return AutoModelForCausalLM.from_pretrained(tinystories / "model", dtype=torch.float32)


@pytest.fixture(scope="module")
def bridge(tinystories: Path) -> "sae_lens.SAETransformerBridge":
    """The TinyStories model with SAELens's and TransformerLens's hooks."""
    return sae_lens.SAETransformerBridge.boot_transformers(str(tinystories / "model"), device="cpu")


@pytest.fixture(scope="module")
def hooked() -> HookedSAETransformer:
    """A model of TransformerLens's own kind, two layers of width 16 with random weights."""
    torch.manual_seed(0)
    cfg = HookedTransformerConfig(n_layers=2, d_model=16, n_ctx=32, d_head=8, n_heads=2, d_vocab=512, act_fn="gelu")
    return HookedSAETransformer(cfg)


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
