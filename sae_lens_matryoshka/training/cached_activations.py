"""Training from an activation cache: SAELens's trainers and everything that is added to them, without a language model.

The data's way: cache -> shuffled batches with a position that checkpoints hold -> SAELens's trainer as on a language
model -> the saved SAE, calibrated and measured on what the cache holds out.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from sae_lens import LanguageModelSAERunnerConfig, MultiSAETrainingRunnerConfig, TrainingSAE
from sae_lens.constants import ACTIVATIONS_STORE_STATE_FILENAME
from sae_lens.registry import get_sae_training_class
from safetensors.torch import load_file, save_file
from torch import Tensor
from typing_extensions import override

from sae_lens_matryoshka.activation_cache.batches import ShuffledBatches, held_out_batches
from sae_lens_matryoshka.activation_cache.cache import ActivationCache
from sae_lens_matryoshka.activation_cache.made_from import hooks_of
from sae_lens_matryoshka.activation_cache.manifest import MANIFEST_FILENAME, is_activation_cache
from sae_lens_matryoshka.errors import ConfigError, UserError
from sae_lens_matryoshka.run_files.building import LanguageModelRunConfig
from sae_lens_matryoshka.saved.trained_from import record_local_paths
from sae_lens_matryoshka.training.language_model import LanguageModelRunner, MultiSAERunner
from sae_lens_matryoshka.training.options import CheckpointOptions
from sae_lens_matryoshka.training.resuming.random_states import random_states, set_random_states
from sae_lens_matryoshka.training.resuming.resumable_store import POSITION_FILENAME
from sae_lens_matryoshka.training.trained_saes import DEFAULT_SAMPLES, Samples, SavedSAE, prepare_configs
from sae_lens_matryoshka.training.training_on import StartingPoint

logger = logging.getLogger(__name__)


@dataclass
class CachedMultiSAERunnerConfig(MultiSAETrainingRunnerConfig):
    """SAELens's config for several SAEs with two fields more, which its config for a single one has."""

    use_cached_activations: bool = True
    cached_activations_path: str | None = None


def read_from(cfg: LanguageModelRunConfig, activations: str | Path) -> LanguageModelRunConfig:
    """A run's config with the folder of activations that it reads, as SAELens records it.

    Args:
        cfg: The run's config.
        activations: An activation cache; for a single SAE also one that SAELens has written.

    Raises:
        ConfigError: If the folder is not there or is neither, or the run file names another.
    """
    folder = Path(activations).expanduser()
    of_saelens = (folder / "dataset_info.json").is_file()  # of the package datasets
    if not is_activation_cache(folder) and not (of_saelens and isinstance(cfg, LanguageModelSAERunnerConfig)):
        why = f"has no {MANIFEST_FILENAME}" if folder.is_dir() else "is no folder"
        also = ", and SAELens takes its own for a single SAE only" if of_saelens else ""
        raise ConfigError(
            f"--activations {activations} {why}{also}; make an activation cache with sae-lens-matryoshka cache."
        )
    if isinstance(cfg, MultiSAETrainingRunnerConfig):
        cached = CachedMultiSAERunnerConfig.__new__(CachedMultiSAERunnerConfig)
        cached.__dict__.update(cfg.__dict__)  # made anew, it would get another id below its checkpoint_path
        cfg = cached
    elif cfg.use_cached_activations and Path(cfg.cached_activations_path or "").resolve() != folder.resolve():
        raise ConfigError(
            f"--activations {activations}, but the run says cached_activations_path={cfg.cached_activations_path!r}; "
            f"leave one of them out."
        )
    cfg.use_cached_activations = True
    cfg.cached_activations_path = str(folder)
    return cfg


def open_activations(cfg: LanguageModelRunConfig, checkpointing: CheckpointOptions) -> ActivationCache | None:
    """The activation cache that a run reads, checked; None if it reads a model's activations, or a cache of SAELens's.

    Args:
        cfg: The run's config; what it says of reading the model ahead is taken back.
        checkpointing: What checkpoints hold and how many are kept.

    Raises:
        UserError: If the cache is not whole or not one of the run's activations, or an option would not be used.
    """
    path = getattr(cfg, "cached_activations_path", None) if getattr(cfg, "use_cached_activations", False) else None
    if path is None or not is_activation_cache(Path(path)):
        return None
    if not checkpointing.exact or checkpointing.max_buffer_bytes != CheckpointOptions.max_buffer_bytes:
        raise ConfigError(
            "--no-exact-resume and --max-buffer-gb are about a buffer of activations in checkpoints; from an "
            "activation cache there is none, and resuming is exact. Leave them out."
        )
    if isinstance(cfg, MultiSAETrainingRunnerConfig) and cfg.evaluator is not None:
        raise ConfigError(
            "evaluator is called with SAELens's own evaluations, which need the language model; leave it out, or train "
            "without --activations."
        )
    cfg.prefetch_llm_batches = False  # there is no language model to wait for
    cache = ActivationCache(Path(path))
    cache.check_serves(cfg)
    logger.info(
        f"Training on {cache.n_training:,} of them; {cache.n_held_out:,} that no run trains on are held out for "
        f"calibrating and measuring."
    )
    if cfg.logger.log_to_wandb:
        logger.info("Without a language model there are no losses recovered to log to wandb; evaluate measures them.")
    return cache


def held_out_samples(cache: ActivationCache, calibration_samples: int | None, measure_samples: int | None) -> Samples:
    """How many held-out activations to calibrate and to measure on.

    Args:
        cache: The cache.
        calibration_samples: What the user asks for; None takes the usual number, or all if they are fewer.
        measure_samples: The same for measuring.

    Raises:
        ConfigError: If the user asks for more than there are.
    """
    for option, n_samples in (("--calibration-samples", calibration_samples), ("--measure-samples", measure_samples)):
        if (n_samples or 0) > cache.n_held_out:
            raise ConfigError(
                f"{option} {n_samples} is above the {cache.n_held_out} activations that {cache.folder} holds out; "
                f"lower it, or cache more."
            )
    usual = min(DEFAULT_SAMPLES, cache.n_held_out)
    return Samples(*(usual if n is None else n for n in (calibration_samples, measure_samples)))


def cached_runner(
    cfg: LanguageModelRunConfig, checkpointing: CheckpointOptions, start: StartingPoint | None, cache: ActivationCache
) -> "CachedRunner | CachedMultiSAERunner":
    """The runner of a config whose activations are in a cache.

    Args:
        cfg: The config.
        checkpointing: How many checkpoints are kept.
        start: The SAE to train on from; None starts a new one.
        cache: The cache, which serves the run.
    """
    torch.manual_seed(cfg.seed)
    if isinstance(cfg, MultiSAETrainingRunnerConfig):
        return CachedMultiSAERunner(cfg, checkpointing, cache)
    return CachedRunner(cfg, checkpointing, start, cache)


class CachedActivations(Iterator[Tensor]):
    """An activation cache in the place of SAELens's activation store, with all that the runners ask of one."""

    def __init__(self, cache: ActivationCache, cfg: LanguageModelRunConfig) -> None:
        self.cache = cache
        self.batches = ShuffledBatches(
            cache, list(hooks_of(cfg)), cfg.train_batch_size_tokens, cfg.seed, cfg.act_store_device or cfg.device
        )

    def __next__(self) -> Tensor:
        [activations] = next(self.batches).values()
        return activations

    def get_multi_hook_data_loader(self) -> Iterator[dict[str, Tensor]]:
        return self.batches

    def held_out(self, hook_name: str) -> Iterator[Tensor]:
        """What no run trains on, once."""
        return held_out_batches(self.cache, hook_name, self.batches.batch_size, self.batches.device)

    def save_to_checkpoint(self, checkpoint_path: str | Path) -> None:
        tensors, plain = random_states()
        save_file(tensors, Path(checkpoint_path) / ACTIVATIONS_STORE_STATE_FILENAME)
        position = {
            "cache": self.cache.fingerprint,
            "epoch": self.batches.epoch,
            "n_read": self.batches.n_read,
            "random_states": plain,
        }
        (Path(checkpoint_path) / POSITION_FILENAME).write_text(json.dumps(position), encoding="utf-8")

    def load_from_checkpoint(self, checkpoint_path: str | Path) -> None:
        """Go on where a checkpoint was made.

        Raises:
            UserError: If it was made on another cache.
        """
        position = json.loads((Path(checkpoint_path) / POSITION_FILENAME).read_text(encoding="utf-8"))
        if position.get("cache") != self.cache.fingerprint:
            raise UserError(
                f"The checkpoint {checkpoint_path} was made on other activations than {self.cache.folder} holds now; "
                f"start afresh without --resume, or train on from its weights with from_pretrained_path."
            )
        self.batches.go_to(position["epoch"], position["n_read"])
        set_random_states(
            load_file(Path(checkpoint_path) / ACTIVATIONS_STORE_STATE_FILENAME), position["random_states"]
        )


class CachedRunner(LanguageModelRunner):
    """The runner for one SAE, whose activations come from a cache. Neither model nor data set is loaded."""

    def __init__(
        self,
        cfg: LanguageModelSAERunnerConfig[Any],
        checkpointing: CheckpointOptions,
        start: StartingPoint | None,
        cache: ActivationCache,
    ) -> None:
        # not what the classes above do: they load the model
        self.cfg = cfg
        self.checkpointing = checkpointing
        self.start = start
        self.sae = TrainingSAE.from_dict(cfg.get_training_sae_cfg_dict()) if start is None else start.sae
        self.sae.to(cfg.device)
        prepare_configs([self.sae])
        record_local_paths(cfg, [self.sae])
        self.cached = CachedActivations(cache, cfg)
        self.activations_store = cast(Any, self.cached)
        self.evaluator = cast(Any, None)

    @override
    def saved(self) -> list[SavedSAE]:
        """What a run saves, with the activations that the cache holds out."""
        return [SavedSAE("sae", "", partial(self.cached.held_out, self.cfg.hook_name), self.cfg.device)]


class CachedMultiSAERunner(MultiSAERunner):
    """The same for several SAEs."""

    def __init__(
        self, cfg: MultiSAETrainingRunnerConfig, checkpointing: CheckpointOptions, cache: ActivationCache
    ) -> None:
        self.cfg = cfg
        self.checkpointing = checkpointing
        self.saes = {
            name: get_sae_training_class(sae_cfg.architecture())[0](sae_cfg).to(cfg.device)
            for name, sae_cfg in cfg.saes.items()
        }
        prepare_configs(self.saes.values())
        record_local_paths(cfg, self.saes.values())
        self.cached = CachedActivations(cache, cfg)
        self.activations_store = cast(Any, self.cached)
        self.evaluator = cast(Any, None)

    @override
    def saved(self) -> list[SavedSAE]:
        """What a run saves, with the activations that the cache holds out."""
        return [
            SavedSAE(name, name, partial(self.cached.held_out, hook_name), self.cfg.device)
            for name, hook_name in self.cfg.hook_names_per_sae.items()
        ]
