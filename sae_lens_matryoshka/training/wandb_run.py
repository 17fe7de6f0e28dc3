"""Starting a run on Weights & Biases so that a server out of reach never stops training."""

import logging
import os
from typing import Any

import wandb
from sae_lens import LanguageModelSAERunnerConfig, MultiSAETrainingRunnerConfig

logger = logging.getLogger(__name__)

SECONDS_TO_FINISH = 600.0
"""How long to wait at the end for what has not been sent yet. It stays on disk and can be synced."""


def start_wandb(cfg: "LanguageModelSAERunnerConfig[Any] | MultiSAETrainingRunnerConfig") -> None:
    """Start the wandb run that SAELens's runner would start; offline if the server refuses or does not answer.

    SAELens's own ``wandb.init`` then finds this run and goes on with it. How long wandb tries is set by
    ``WANDB_INIT_TIMEOUT`` (seconds; 90 if it is not set).
    """
    if not cfg.logger.log_to_wandb:
        return
    run: dict[str, Any] = {
        "project": cfg.logger.wandb_project,
        "entity": cfg.logger.wandb_entity,
        "config": cfg.to_dict(),
        "name": cfg.logger.run_name,
        "id": cfg.logger.wandb_id,
    }
    if "WANDB_FINISH_TIMEOUT" not in os.environ and hasattr(wandb.Settings(), "finish_timeout"):  # older wandb lacks it
        run["settings"] = wandb.Settings(finish_timeout=SECONDS_TO_FINISH)
    try:
        wandb.init(**run)
    except wandb.Error as error:  # no answer, or no login
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        offline = wandb.init(**run, mode="offline")
        folder = os.path.dirname(offline.dir)
        logger.warning(f"wandb cannot be reached ({reason}): logging offline; send it later with: wandb sync {folder}")
