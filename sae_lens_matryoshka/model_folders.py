"""Looking at a language model's folder before it is loaded: transformers makes random weights of what is missing."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from sae_lens_matryoshka.errors import UserError, listed


def check_model_folder(name: str | Path) -> None:
    """Refuse a model folder whose weights are damaged or do not hold every tensor of the model.

    Only the headers of its safetensors files are read. Names that are no folders, and folders without such files, are
    left to what loads the model, and so is a config that transformers cannot use.

    Args:
        name: The folder.

    Raises:
        UserError: If a file cannot be read, or tensors are missing or have other shapes than the config says.
    """
    folder = Path(name)
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
