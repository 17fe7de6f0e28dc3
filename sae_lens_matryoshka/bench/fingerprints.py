"""Names for what results are made from, equal for equal content only.

A result or a cache entry is reused only where everything that could change it has the same name. Every byte counts: of
weights, of tokenizers (of slow ones their vocabulary), of texts.
"""

import json
import re
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sae_lens_matryoshka.bench.models import Model
from sae_lens_matryoshka.saved.fingerprints import content_hash, file_hash, module_hash

PACKAGES = (
    "sae-lens-matryoshka", "sae-bench", "sae-lens", "transformer-lens", "transformers", "torch", "scikit-learn",
)  # fmt: skip
"""Packages whose versions can change a result."""

_NOT_CONTENT = {
    # where a model lies, what it is called and how it was made
    "model_name", "tokenizer_name", "_name_or_path", "name_or_path", "device", "n_devices", "seed", "init_weights",
    "init_mode", "transformers_version", "dtype", "torch_dtype",
}  # fmt: skip
"""Settings of a model that say nothing of what it computes; its data type is that of its weights."""


def model_hash(model: Model) -> str:
    """A name for a language model: its class, its settings and its weights, wherever it was loaded from."""
    config = getattr(getattr(model, "original_model", None), "config", None)
    described = [
        # without where an object lies in memory
        {name: re.sub(r" at 0x[0-9a-f]+", "", repr(value)) for name, value in part.items() if name not in _NOT_CONTENT}
        for part in (vars(model.cfg), {} if config is None else config.to_dict())
    ]
    return content_hash([type(model).__name__, described, module_hash(model)])


def tokenizer_hash(tokenizer: Any) -> str:
    """A name for what a tokenizer does with a text.

    Args:
        tokenizer: A tokenizer of the package transformers, or None.
    """
    if tokenizer is None:
        return "none"
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: Any = sorted(tokenizer.get_vocab().items())
    else:
        # how it last padded and truncated is part of a fast tokenizer's state
        rules = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("padding", "truncation")}
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    return content_hash([type(tokenizer).__name__, rules, special])


def path_hash(path: Path) -> str:
    """A name for the contents of a file, with its ending, or of all files below a folder, with their names."""
    if not path.is_dir():
        return content_hash([path.suffix, file_hash(path)])
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return content_hash([[str(file.relative_to(path)), file_hash(file)] for file in files])


@cache
def package_versions() -> dict[str, str]:
    """The versions of the packages that can change a result."""
    return {package: version(package) for package in PACKAGES}
