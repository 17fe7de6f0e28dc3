"""Finding the checkpoint to resume from, and telling a whole one from one that is damaged or another run's.

Two runs are the same if SAELens's configs of both, every field filled in, are equal in all that decides on the SAEs.
"""

import json
import logging
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from sae_lens import MultiSAETrainingRunnerConfig
from sae_lens.constants import (
    ACTIVATION_SCALER_CFG_FILENAME,
    ACTIVATIONS_STORE_STATE_FILENAME,
    RUNNER_CFG_FILENAME,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    TRAINER_STATE_FILENAME,
)
from safetensors import SafetensorError, safe_open

from sae_lens_matryoshka.errors import ConfigError, listed
from sae_lens_matryoshka.run_files.building import LanguageModelRunConfig, sae_configs
from sae_lens_matryoshka.saved.checks import check_saved_sae
from sae_lens_matryoshka.training.resuming.manifest import MANIFEST_FILENAME, find_damage
from sae_lens_matryoshka.untrusted.bounded import load_json

logger = logging.getLogger(__name__)

_RUNNER_FILES = (ACTIVATIONS_STORE_STATE_FILENAME, RUNNER_CFG_FILENAME)
_SAE_FILES = (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, TRAINER_STATE_FILENAME, ACTIVATION_SCALER_CFG_FILENAME)

_MAY_DIFFER = {
    # where things are and how they are reported
    "checkpoint_path", "output_path", "resume_from_checkpoint", "logger", "verbose",
    # whether code of a data set may be run
    "dataset_trust_remote_code",
    # how often to save
    "n_checkpoints", "save_final_checkpoint",
    # where it is computed, by which release
    "device", "llm_device", "act_store_device", "sae_lens_version", "sae_lens_training_version",
}  # fmt: skip
"""Fields in which two configs of the same run may differ."""

_SAE_MAY_DIFFER = {"device", "metadata"}
"""The same for the config of an SAE: SAELens sets them in the course of a run."""


def find_checkpoint(cfg: LanguageModelRunConfig, resume: str | Path) -> str | None:
    """The checkpoint folder that a run should resume from. What ``"auto"`` decides is logged in one line.

    Args:
        cfg: The run's config.
        resume: A checkpoint folder, or ``"auto"`` for the newest complete one under the run's ``checkpoint_path`` that
            the same run has made. Damaged ones are passed over with a warning.

    Returns:
        The folder, or None if ``"auto"`` finds none.

    Raises:
        ConfigError: If the folder given is not a complete checkpoint of the same run.
    """
    if resume == "":
        raise ConfigError("--resume (resume_from_checkpoint) is empty; give auto, or the folder of a checkpoint.")
    if resume != "auto":
        checkpoint = Path(resume).expanduser()
        _check_resumable(checkpoint, cfg)
        return str(checkpoint)
    checkpoint, reason = _newest_checkpoint(cfg)
    logger.info(f"Starting afresh, because {reason}." if checkpoint is None else f"Continuing from {checkpoint}.")
    return None if checkpoint is None else str(checkpoint)


def why_not_finished(output: Path, cfg: LanguageModelRunConfig, calibration_samples: int) -> str | None:
    """Why an output folder does not hold what a run would write there, in a few words; None if it does.

    That is all its SAEs, made with the same settings. How many samples the levels were measured on is no such setting:
    they can be measured again.

    Args:
        output: The output folder.
        cfg: The run's config.
        calibration_samples: How many samples thresholds would be calibrated on.
    """
    try:
        made = _made_with(output)
        saved_cfgs = [check_saved_sae(folder) for folder in sae_folders(output, cfg).values()]
    except (OSError, ValueError):
        return "it does not hold the SAEs of this run"
    try:
        different = _different_fields(made, cfg)
    except (AttributeError, TypeError):
        return f"its {RUNNER_CFG_FILENAME} is not that of a run"
    if made.get("training_tokens") != cfg.training_tokens:
        different.append("training_tokens")
    calibrated_on = [(saved.get("metadata") or {}).get("calibration_samples") for saved in saved_cfgs]
    if any(n_samples not in (None, calibration_samples) for n_samples in calibrated_on):
        different.append("--calibration-samples")
    return f"it was made with other settings of {listed(different, 5)}" if different else None


def sae_folders(output: Path, cfg: LanguageModelRunConfig) -> dict[str, Path]:
    """Where a run saves its SAEs, by name: in the output folder itself for one, in a folder each for several."""
    if isinstance(cfg, MultiSAETrainingRunnerConfig):
        return {name: output / name for name in cfg.saes}
    return {"sae": output}


def _check_resumable(checkpoint: Path, cfg: LanguageModelRunConfig) -> None:
    if reason := _why_incomplete(checkpoint):
        raise ConfigError(
            f"{checkpoint} is not a complete SAELens checkpoint ({reason}); give another or --resume auto."
        )
    if checkpoint.name.startswith("final_"):
        raise ConfigError(
            f"{checkpoint} is a finished SAE, with the normalization of its input folded in; resume from another, or "
            f"train on from its weights with from_pretrained_path."
        )
    if different := _different_fields(_made_with(checkpoint), cfg):
        raise ConfigError(
            f"The checkpoint {checkpoint} was made with other settings of {listed(different, 5)}, and a resumed run "
            f"goes on as it was; set them as they were, or train on from its weights with from_pretrained_path."
        )


def _newest_checkpoint(cfg: LanguageModelRunConfig) -> tuple[Path | None, str]:
    """The newest complete checkpoint of the same run; if there is none, why."""
    if cfg.checkpoint_path is None:
        return None, "checkpoint_path is null"
    # SAELens adds an id of its own below checkpoint_path, then the number of samples trained on; 'final_...' is a
    # finished SAE with its normalization folded in
    folder = Path(cfg.checkpoint_path).parent
    candidates = [path for path in folder.glob("*/*") if path.name.isdecimal() and path.is_dir()]
    reason = ""
    for checkpoint in sorted(candidates, key=lambda path: path.stat().st_mtime, reverse=True):
        if damage := _why_incomplete(checkpoint):
            logger.warning(f"The checkpoint {checkpoint} is passed over: {damage}.")
        elif different := _different_fields(_made_with(checkpoint), cfg):
            reason = reason or f"{checkpoint} was made with other settings of {listed(different, 5)}"
        else:
            return checkpoint, ""
    return None, reason or f"there is no {'complete ' if candidates else ''}checkpoint below {folder}"


def _why_incomplete(checkpoint: Path) -> str | None:
    """What a folder lacks of what SAELens reads when it resumes a run on a language model; None if nothing.

    Checkpoints that ``train`` has made list their files with digests, which are compared. Of others, the files are
    checked for being there and whole.
    """
    if not checkpoint.is_dir():
        return "there is no such folder"
    # several SAEs are in a folder each, one is in the checkpoint itself
    folders = sorted(f"{path.parent.name}/" for path in checkpoint.glob(f"*/{SAE_CFG_FILENAME}")) or [""]
    names = [*_RUNNER_FILES, *(f"{folder}{name}" for folder in folders for name in _SAE_FILES)]
    for name in names:
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
    if (checkpoint / MANIFEST_FILENAME).is_file():
        return find_damage(checkpoint)
    return next((f"{name} is damaged" for name in names if not _is_readable(checkpoint / name)), None)


def _is_readable(path: Path) -> bool:
    try:
        if path.suffix == ".json":
            load_json(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                pass
        else:  # torch.save writes a zip archive, whose directory comes last
            return zipfile.is_zipfile(path)
    except (ValueError, SafetensorError):
        return False
    return True


def _made_with(checkpoint: Path) -> dict[str, Any]:
    return load_json((checkpoint / RUNNER_CFG_FILENAME).read_text(encoding="utf-8"))


def _different_fields(made: Mapping[str, Any], cfg: LanguageModelRunConfig) -> list[str]:
    """The fields in which a run's config differs from one that SAELens has written, the SAEs' fields included."""
    wanted_fields = dict(_compared_fields(json.loads(json.dumps(cfg.to_dict()))))
    made_fields = dict(_compared_fields(made))
    if cfg.lr_scheduler_name == "constant" and cfg.lr_decay_steps == 0:
        # then only the end depends on it; a schedule goes on in a resumed run as it was laid out
        for compared in (wanted_fields, made_fields):
            compared.pop("training_tokens", None)
    # a field that is younger than the written config had its default then
    saes = {name: _defaults(sae) for name, sae in sae_configs(cfg).items()}
    is_multi = isinstance(cfg, MultiSAETrainingRunnerConfig)
    defaults = dict(_compared_fields(_defaults(cfg) | ({"saes": saes} if is_multi else saes)))
    names = [*wanted_fields, *(name for name in made_fields if name not in wanted_fields)]
    return [name for name in names if made_fields.get(name, defaults.get(name)) != wanted_fields.get(name)]


def _defaults(cfg: Any) -> dict[str, Any]:
    return {f.name: f.default_factory() if callable(f.default_factory) else f.default for f in fields(cfg)}


def _compared_fields(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The fields of a written config that decide on the SAEs, those of the SAEs as in a run file."""
    for key, value in config.items():
        if key not in _MAY_DIFFER | {"sae", "saes"}:
            yield key, value
    saes = {f"saes.{name}": sae for name, sae in config.get("saes", {}).items()}
    for field, sae in ({"sae": config["sae"]} if "sae" in config else saes).items():
        for key, value in sae.items():
            if key not in _SAE_MAY_DIFFER:
                yield f"{field}.{key}", value
