"""Training on a SAELens synthetic model: one SAE after the other on the same samples, scored against its features."""

import uuid
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sae_lens import logger
from sae_lens.synthetic import SyntheticModel, SyntheticSAERunner, SyntheticSAERunnerConfig
from torch import Tensor

from sae_lens_matryoshka.errors import UserError
from sae_lens_matryoshka.measuring.synthetic_scores import plot_scores, score_on_synthetic_model
from sae_lens_matryoshka.run_files.building import check_synthetic_d_in
from sae_lens_matryoshka.training.output_folders import SCORES_FIGURE_FILENAME, SCORES_FILENAME
from sae_lens_matryoshka.training.sample_pool import SamplePool
from sae_lens_matryoshka.training.trained_saes import SavedSAE, TrainedSAE, prepare_configs, put_sparsity_in_order
from sae_lens_matryoshka.training.wandb_run import wandb_run
from sae_lens_matryoshka.untrusted.csv_tables import write_csv


def train_on_synthetic_model(
    configs: dict[str, SyntheticSAERunnerConfig[Any]], staging: Path, sample_pool: int | None = None
) -> list[SavedSAE]:
    """Train and save.

    Args:
        configs: The config of SAELens's runner for every SAE, by name; all on the same synthetic model.
        staging: The folder to write: for one SAE itself, for several a folder each in it.
        sample_pool: How many samples to draw once for all of them; None draws each batch afresh, and again for each.

    Raises:
        ConfigError: If an SAE is not as wide as the model's activations.
    """
    first = next(iter(configs.values()))
    synthetic_model = SyntheticModel.load_from_source(first.synthetic_model, device=first.device)
    for name, cfg in configs.items():  # again for a model that was saved
        check_synthetic_d_in(f"saes.{name}", cfg.sae.d_in, synthetic_model.cfg.hidden_dim)
    pool = None
    if sample_pool is not None:
        torch.manual_seed(synthetic_model.cfg.seed or 0)
        pool = SamplePool(synthetic_model, sample_pool)
    saved: list[SavedSAE] = []
    run_id = uuid.uuid4().hex[:8]  # as SAELens's other runners do; its synthetic one overwrites checkpoints
    for name, cfg in configs.items():
        folder = name if len(configs) > 1 else ""
        cfg.output_path = str(staging / folder)
        if cfg.checkpoint_path is not None:
            cfg.checkpoint_path = str(Path(cfg.checkpoint_path) / run_id / folder)
        # every SAE starts from the same seed and sees the same samples
        torch.manual_seed(synthetic_model.cfg.seed or 0)
        logger.info(f"Training {name} on the synthetic model")
        if pool is not None:
            pool.restart()
            cfg.sae.metadata.sample_pool = sample_pool
        source: Any = synthetic_model if pool is None else pool
        runner = SyntheticSAERunner(cfg, override_synthetic_model=source)
        prepare_configs([runner.sae])
        try:
            with wandb_run(cfg):
                sae = runner.run().sae
        except (OSError, ValueError) as error:  # a file that could not be written; numbers that are not finite
            raise UserError(f"The SAE {name!r} cannot be trained on the synthetic model: {error}") from error
        put_sparsity_in_order(staging / folder, sae)
        activations = partial(_samples, synthetic_model, cfg.batch_size)
        score = partial(score_on_synthetic_model, synthetic_model=synthetic_model, n_samples=cfg.eval_samples)
        saved.append(SavedSAE(name, folder, activations, cfg.device, score))
    return saved


def write_scores(saes: Iterable[TrainedSAE], output: Path) -> None:
    """Write how well the features were found as a table and a plot.

    Args:
        saes: The SAEs of a run on a synthetic model; those without scores are left out.
        output: The run's output.
    """
    scores_by_name = {sae.name: sae.scores for sae in saes if sae.scores is not None}
    if scores_by_name:
        write_csv(output / SCORES_FILENAME, [{"sae": name, **asdict(s)} for name, s in scores_by_name.items()])
        plot_scores(scores_by_name, output / SCORES_FIGURE_FILENAME)


def _samples(synthetic_model: SyntheticModel, batch_size: int) -> Iterator[Tensor]:
    while True:
        yield synthetic_model.sample(batch_size)
