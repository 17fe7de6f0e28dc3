"""Starting a run on Weights & Biases so that a server out of reach never stops training."""

import logging
import os
from typing import Any

import requests
import wandb
from sae_lens import LanguageModelSAERunnerConfig, MultiSAETrainingRunnerConfig

SECONDS_TO_ANSWER = 10.0
"""How long the server may take to answer at the start."""

SECONDS_TO_FINISH = 600.0
"""How long to wait at the end for what has not been sent yet. It stays on disk and can be synced."""

logger = logging.getLogger(__name__)


def start_wandb(cfg: "LanguageModelSAERunnerConfig[Any] | MultiSAETrainingRunnerConfig") -> None:
    """Start the wandb run that SAELens's runner would start, or have it log offline where that cannot be done.

    SAELens's own ``wandb.init`` finds the run that is started here and goes on with it. Alone it would try for 90
    seconds to reach a server that does not answer, and then raise an error. Offline means for the whole process.
    """
    settings = wandb.setup().settings
    if not cfg.logger.log_to_wandb or settings.mode != "online":
        return
    try:
        requests.head(settings.base_url, timeout=SECONDS_TO_ANSWER)
        _init_as_saelens_does(cfg)
    except (requests.RequestException, wandb.Error) as error:  # no answer; no login or no right to write there
        wandb.setup(wandb.Settings(mode="offline"))
        no_answer = isinstance(error, requests.RequestException)
        reason = f"{settings.base_url} does not answer" if no_answer else str(error).partition("\n")[0].rstrip(".")
        logger.warning(
            f"wandb cannot be used ({reason}), so this run logs offline, below {settings.wandb_dir}; the command "
            f"that sends it is shown at the end, wandb sync and its folder."
        )


def _init_as_saelens_does(cfg: "LanguageModelSAERunnerConfig[Any] | MultiSAETrainingRunnerConfig") -> None:
    options: dict[str, Any] = {}
    if "WANDB_FINISH_TIMEOUT" not in os.environ and hasattr(wandb.Settings(), "finish_timeout"):  # older wandb lacks it
        options["settings"] = wandb.Settings(finish_timeout=SECONDS_TO_FINISH)
    wandb.init(
        project=cfg.logger.wandb_project,
        entity=cfg.logger.wandb_entity,
        config=cfg.to_dict(),
        name=cfg.logger.run_name,
        id=cfg.logger.wandb_id,
        **options,
    )
