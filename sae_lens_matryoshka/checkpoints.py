"""Finding the checkpoint to resume from, and telling a whole one from one that is damaged or another run's."""

import json
import logging
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_lens.constants import (
    ACTIVATION_SCALER_CFG_FILENAME,
    ACTIVATIONS_STORE_STATE_FILENAME,
    RUNNER_CFG_FILENAME,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    TRAINER_STATE_FILENAME,
)
from safetensors import SafetensorError, safe_open

from sae_lens_matryoshka.config_files import ConfigError
from sae_lens_matryoshka.training.manifest import MANIFEST_FILENAME, find_damage

logger = logging.getLogger(__name__)

_RUNNER_FILES = (ACTIVATIONS_STORE_STATE_FILENAME, RUNNER_CFG_FILENAME)
_SAE_FILES = (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, TRAINER_STATE_FILENAME, ACTIVATION_SCALER_CFG_FILENAME)

_MAY_DIFFER = {
    # where things are and how they are reported
    "checkpoint_path", "output_path", "resume_from_checkpoint", "logger", "verbose",
    # how long to train and how often to save
    "training_tokens", "n_checkpoints", "save_final_checkpoint",
    # 'auto' in the run file, the device in the checkpoint
    "device", "llm_device", "act_store_device",
}  # fmt: skip
"""Fields of a run file in which a run may differ from the checkpoint that it goes on from."""


def find_checkpoint(run: Mapping[str, Any], resume: str | Path) -> str | None:
    """The checkpoint folder that a run should resume from.

    Args:
        run: A run file's contents.
        resume: A checkpoint folder, or ``"auto"`` for the newest complete one under the run's ``checkpoint_path`` that
            was made with the run's settings. Damaged ones are passed over with a warning.

    Returns:
        The folder, or None if ``"auto"`` finds none.

    Raises:
        ConfigError: If the folder given is not a complete checkpoint, or the run's kind cannot resume.
    """
    if "synthetic_model" in run:
        raise ConfigError(
            "A run on a synthetic model cannot be resumed: SAELens's SyntheticSAERunner has no such option."
        )
    if resume != "auto":
        if reason := why_incomplete(Path(resume)):
            raise ConfigError(
                f"{resume} is not a complete SAELens checkpoint ({reason}); give another or --resume auto."
            )
        if different := _different_fields(Path(resume), run):
            logger.warning(f"The checkpoint {resume} was made with other settings of {', '.join(different)}.")
        return str(resume)
    # SAELens adds an id of its own below checkpoint_path, then the number of samples trained on; 'final_...' is a
    # finished SAE with its normalization folded in
    folder = Path(run.get("checkpoint_path") or "checkpoints")
    candidates = [path for path in folder.glob("*/*") if path.name.isdecimal() and path.is_dir()]
    for checkpoint in sorted(candidates, key=lambda path: path.stat().st_mtime, reverse=True):
        if reason := why_incomplete(checkpoint):
            logger.warning(f"The checkpoint {checkpoint} is passed over: {reason}.")
        elif not _different_fields(checkpoint, run):
            return str(checkpoint)
    return None


def why_incomplete(checkpoint: Path) -> str | None:
    """What a folder lacks of what SAELens reads when it resumes a run on a language model; None if nothing.

    Checkpoints that ``train`` has made list their files with digests, which are compared. Of others, the files are
    checked for being there and whole.
    """
    if not checkpoint.is_dir():
        return "there is no such folder"
    names = [*_RUNNER_FILES, *(f"{folder}{name}" for folder in _sae_folders(checkpoint) for name in _SAE_FILES)]
    for name in names:
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
    if (checkpoint / MANIFEST_FILENAME).is_file():
        return find_damage(checkpoint)
    return next((f"{name} is damaged" for name in names if not _is_readable(checkpoint / name)), None)


def _sae_folders(checkpoint: Path) -> list[str]:
    """Where the SAEs are: in the folder itself for one, in a folder each for several."""
    folders = sorted(f"{path.parent.name}/" for path in checkpoint.glob(f"*/{SAE_CFG_FILENAME}"))
    return folders or [""]


def _is_readable(path: Path) -> bool:
    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                pass
        else:  # torch.save writes a zip archive, whose directory comes last
            return zipfile.is_zipfile(path)
    except (ValueError, SafetensorError):
        return False
    return True


def _different_fields(checkpoint: Path, run: Mapping[str, Any]) -> list[str]:
    """The fields that the run gives otherwise than the checkpoint was made with, its SAEs' included."""
    made = json.loads((checkpoint / RUNNER_CFG_FILENAME).read_text(encoding="utf-8"))
    given = {key: value for key, value in run.items() if key not in _MAY_DIFFER | {"sae", "saes"}}
    different = [key for key, value in given.items() if made.get(key) != value]
    if "saes" in run:
        wanted = list(run["saes"].values() if isinstance(run["saes"], Mapping) else run["saes"])
        made_saes = list(made.get("saes", {}).values())
    else:
        wanted, made_saes = [run.get("sae", {})], [made.get("sae", {})]
    if len(wanted) != len(made_saes):
        return [*different, "saes"]
    for sae, made_sae in zip(wanted, made_saes, strict=True):
        different += [f"sae.{key}" for key, value in sae.items() if key != "name" and made_sae.get(key) != value]
    return different
