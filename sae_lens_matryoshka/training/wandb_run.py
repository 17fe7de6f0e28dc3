"""Logging to Weights & Biases so that nothing that goes wrong there stops training.

SAELens logs through functions of the module ``wandb``, whose errors would end a run hours after its start: a server out
of reach, a name that wandb does not take, a full disk. Here the run is started as SAELens would start it, or offline,
and while it lasts those functions are replaced by ones that warn once and go on.
"""

import functools
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import requests
import wandb
from sae_lens import LoggingConfig, MultiSAETrainingRunnerConfig
from typing_extensions import override

from sae_lens_matryoshka.errors import first_line
from sae_lens_matryoshka.run_files.building import RunnerConfig

SECONDS_TO_ANSWER = 10.0
"""How long the server may take to answer at the start."""

SECONDS_TO_FINISH = 600.0
"""How long to wait at the end for what has not been sent yet. It stays on disk and can be synced."""

MAX_ARTIFACT_NAME = 128 - len("_log_feature_sparsity")
"""How long wandb lets the name of an artifact be, without what SAELens adds to it for the second one of an SAE."""

logger = logging.getLogger(__name__)


@contextmanager
def wandb_run(cfg: RunnerConfig) -> Iterator[None]:
    """Run a SAELens runner in this block, and its wandb run cannot stop it. Without ``log_to_wandb`` there is none.

    SAELens's own ``wandb.init`` is given the run that is started here. Alone it would try for 90 seconds to reach a
    server that does not answer, and then raise an error. Offline means for the whole process.

    Args:
        cfg: The runner's config. Its ``logger`` is replaced; where no run can be started, it logs nothing.
    """
    tolerance = _Tolerance()
    cfg.logger = _TolerantLogging(cfg.logger, tolerance, isinstance(cfg, MultiSAETrainingRunnerConfig))
    if cfg.logger.log_to_wandb:
        cfg.logger.log_to_wandb = _start(cfg)
    if not cfg.logger.log_to_wandb:
        yield
        return
    originals = {name: getattr(wandb, name) for name in ("init", "log", "log_artifact", "finish")}
    replaced = {name: tolerance.of(function) for name, function in originals.items()}
    replaced["init"] = lambda *_, **__: wandb.run
    for name, function in replaced.items():
        setattr(wandb, name, function)
    try:
        yield
    finally:
        if wandb.run is not None:  # the runner has not come to finishing it
            wandb.finish(exit_code=1)
        for name, function in replaced.items():
            if getattr(wandb, name) is function:  # finishing a run has reset some of them
                setattr(wandb, name, originals[name])


def artifact_name(name: str) -> str:
    """A name for an artifact that wandb takes: SAELens's where it does, else with underscores, the end of a long one.

    Args:
        name: The name to make it from, as SAELens's ``get_name`` gives it.
    """
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name.replace("/", "__"))[-MAX_ARTIFACT_NAME:]


class _Tolerance:
    """Makes functions of wandb go on after an error, with one warning for all of them."""

    def __init__(self) -> None:
        self.has_warned = False

    def of(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def tolerant(*arguments: Any, **options: Any) -> Any:
            try:
                return function(*arguments, **options)
            except Exception as error:  # whatever it is, it is not worth the run
                if not self.has_warned:
                    logger.warning(f"wandb cannot take all that this run logs ({first_line(error)}); training goes on.")
                self.has_warned = True

        return tolerant


class _TolerantLogging(LoggingConfig):
    """SAELens's logging, with artifacts called so that wandb takes them, and those of two SAEs never the same."""

    def __init__(self, logging_config: LoggingConfig, tolerance: _Tolerance, is_of_several: bool) -> None:
        super().__init__(**asdict(logging_config))
        self._tolerance = tolerance
        self._is_of_several = is_of_several

    @override
    def log(
        self,
        trainer: Any,
        weights_path: Path | str,
        cfg_path: Path | str,
        sparsity_path: Path | str | None,
        wandb_aliases: list[str] | None = None,
    ) -> None:
        name = trainer.sae.get_name()
        if self._is_of_several:  # SAELens's name is made of model, hook and width, which they may share
            name += f"_{Path(weights_path).parent.name}"
        name = artifact_name(name)
        named = SimpleNamespace(sae=SimpleNamespace(get_name=lambda: name), cfg=trainer.cfg)
        self._tolerance.of(super().log)(named, weights_path, cfg_path, sparsity_path, wandb_aliases)


def _start(cfg: RunnerConfig) -> bool:
    """Start the wandb run that SAELens's runner would start, offline where it must be, and say whether it could be."""
    settings = wandb.setup().settings
    if settings.mode == "online":
        try:
            requests.head(settings.base_url, timeout=SECONDS_TO_ANSWER)
            _init_as_saelens_does(cfg)
            return True
        except Exception as error:  # no answer; no login or no right to write there
            wandb.setup(wandb.Settings(mode="offline"))
            no_answer = isinstance(error, requests.RequestException)
            reason = f"{settings.base_url} does not answer" if no_answer else first_line(error)
            logger.warning(
                f"wandb cannot be used ({reason}), so this run logs offline, below {settings.wandb_dir}; the command "
                f"that sends it is shown at the end, wandb sync and its folder."
            )
    try:
        _init_as_saelens_does(cfg)
        return True
    except Exception as error:  # settings that it does not take, a folder that cannot be written
        logger.warning(f"wandb cannot be used ({first_line(error)}), so this run logs nothing there.")
        return False


def _init_as_saelens_does(cfg: RunnerConfig) -> None:
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
