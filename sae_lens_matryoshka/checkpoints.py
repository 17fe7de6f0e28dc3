"""Finding the checkpoint to resume from."""

import json
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

from sae_lens_matryoshka.config_files import ConfigError

_RUNNER_FILES = (ACTIVATIONS_STORE_STATE_FILENAME, RUNNER_CFG_FILENAME)
_SAE_FILES = (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, TRAINER_STATE_FILENAME, ACTIVATION_SCALER_CFG_FILENAME)


def find_checkpoint(run: Mapping[str, Any], resume: str | Path) -> str | None:
    """The checkpoint folder that a run should resume from.

    Args:
        run: A run file's contents.
        resume: A checkpoint folder, or ``"auto"`` for the newest complete one under the run's ``checkpoint_path`` whose
            SAE settings equal the run's.

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
        if not is_complete(Path(resume)):
            raise ConfigError(f"{resume} is not a complete SAELens checkpoint; give its folder or --resume auto.")
        return str(resume)
    # SAELens adds an id of its own below checkpoint_path, then the number of samples trained on
    folder = Path(run.get("checkpoint_path") or "checkpoints")
    candidates = [path for path in folder.glob("*/*") if is_complete(path) and _same_saes(path, run)]
    newest = max(candidates, key=lambda path: (path / RUNNER_CFG_FILENAME).stat().st_mtime, default=None)
    return None if newest is None else str(newest)


def is_complete(checkpoint: Path) -> bool:
    """Whether a folder holds everything that SAELens reads when it resumes a run on a language model."""
    if not all((checkpoint / name).is_file() for name in _RUNNER_FILES):
        return False
    sae_folders = _sae_folders(checkpoint)
    return bool(sae_folders) and all((folder / name).is_file() for folder in sae_folders for name in _SAE_FILES)


def _sae_folders(checkpoint: Path) -> list[Path]:
    """The folder itself for one SAE; one folder a SAE for several."""
    if (checkpoint / SAE_CFG_FILENAME).is_file():
        return [checkpoint]
    return sorted(path for path in checkpoint.iterdir() if path.is_dir())


def _same_saes(checkpoint: Path, run: Mapping[str, Any]) -> bool:
    """Whether the settings that the run gives for its SAEs are those the checkpoint was made with."""
    runner_cfg = json.loads((checkpoint / RUNNER_CFG_FILENAME).read_text(encoding="utf-8"))
    if "saes" in run:
        wanted = run["saes"].values() if isinstance(run["saes"], Mapping) else run["saes"]
        made = list(runner_cfg.get("saes", {}).values())
    else:
        wanted = [run.get("sae", {})]
        made = [runner_cfg.get("sae", {})]
    if len(wanted) != len(made):
        return False
    return all(
        all(done.get(key) == value for key, value in sae.items() if key != "name")
        for sae, done in zip(wanted, made, strict=True)
    )
