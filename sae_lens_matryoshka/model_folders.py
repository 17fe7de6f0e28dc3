"""Looking at a language model's folder before it is loaded: transformers makes something up for what is missing.

Of missing tensors it makes random ones, and of a missing tokenizer one that knows its special tokens and nothing else.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from sae_lens_matryoshka.errors import UserError, listed


def check_model_folder(name: str | Path) -> None:
    """Refuse a model folder without a tokenizer, or whose weights are damaged or lack tensors of the model.

    Only the headers of its safetensors files are read. Names that are no folders, and folders without such files, are
    left to what loads the model, and so is a config that transformers cannot use.

    Args:
        name: The folder.

    Raises:
        UserError: If a file cannot be read, tensors are missing or have other shapes than the config says, no file
            holds the tokenizer's vocabulary, or the model is in GGUF format.
    """
    folder = Path(name)
    if folder.is_dir():
        _check_files(folder)
    files = sorted(folder.glob("model*.safetensors")) if folder.is_dir() else []
    for file in files:
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"The weights {file} are truncated or damaged ({error}); copy the model again.") from error
    if not files:
        return
    try:
        with _quietly():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, device_map="meta", output_loading_info=True, local_files_only=True, trust_remote_code=False
            )
    except RuntimeError as error:  # shapes
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"The weights in {folder} are not those of the model in its config.json ({reason}).") from error
    except (OSError, ValueError, ImportError, KeyError, AttributeError):
        return
    if missing := sorted(loaded[1]["missing_keys"]):
        raise UserError(
            f"The model in {folder} lacks {listed(missing, 3)}, which would be random numbers; copy or convert the "
            f"model again."
        )


_VOCABULARY = ("tokenizer.*", "vocab*", "*.model", "*.tiktoken", "*.spm", "tekken.json")


def _check_files(folder: Path) -> None:
    has_config = (folder / "config.json").is_file()
    if not has_config and (gguf := sorted(folder.glob("*.gguf"))):
        raise UserError(
            f"{folder} holds {gguf[0].name} and no config.json: convert it to Hugging Face's format, "
            f"by AutoModelForCausalLM.from_pretrained(..., gguf_file=...) and the same of AutoTokenizer, then "
            f"save_pretrained."
        )
    if not has_config or any(path for pattern in _VOCABULARY for path in folder.glob(pattern)):
        return
    try:  # some kinds, as ByT5's, need no file
        n_known = len(AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False))
        n_embedded = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config().vocab_size
    except (OSError, ValueError, ImportError, KeyError, AttributeError):
        n_known, n_embedded = 0, 1
    if n_known < n_embedded / 2:
        raise UserError(
            f"The model in {folder} has no tokenizer (no tokenizer.json, tokenizer.model or vocabulary); copy "
            f"its tokenizer's files into that folder."
        )


@contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' progress bars and report, which come again when the model is loaded."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
