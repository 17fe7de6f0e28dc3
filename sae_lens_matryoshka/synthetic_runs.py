"""Training on a SAELens synthetic model: one SAE after the other on the same samples, scored against its features."""

import uuid
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, logger
from sae_lens.synthetic import SyntheticModel, SyntheticSAERunner, SyntheticSAERunnerConfig
from torch import Tensor

from sae_lens_matryoshka.config_files import check_synthetic_d_in
from sae_lens_matryoshka.synthetic_benchmark import plot_scores, score_on_synthetic_model
from sae_lens_matryoshka.trained_saes import (
    Samples,
    TrainedSAE,
    calibrate,
    keep_configs_of_run,
    measure_saved,
    put_sparsity_in_order,
    write_csv,
)
from sae_lens_matryoshka.training.wandb_run import wandb_run

SCORES_FILENAME = "scores.csv"
SCORES_FIGURE_FILENAME = "scores.png"


def train_on_synthetic_model(
    configs: dict[str, SyntheticSAERunnerConfig[Any]], staging: Path, samples: Samples
) -> list[TrainedSAE]:
    """Train, calibrate, save, measure and score.

    Args:
        configs: The config of SAELens's runner for every SAE, by name; all on the same synthetic model.
        staging: The folder to write: for one SAE itself, for several a folder each in it.
        samples: How many samples to calibrate and to measure on.

    Raises:
        ConfigError: If an SAE is not as wide as the model's activations.
    """
    first = next(iter(configs.values()))
    synthetic_model = SyntheticModel.load_from_source(first.synthetic_model, device=first.device)
    for name, cfg in configs.items():  # again for a model that was saved
        check_synthetic_d_in(f"saes.{name}", cfg.sae.d_in, synthetic_model.cfg.hidden_dim)
    trained: list[TrainedSAE] = []
    run_id = uuid.uuid4().hex[:8]  # as SAELens's other runners do; its synthetic one overwrites checkpoints
    for name, cfg in configs.items():
        folder = name if len(configs) > 1 else ""
        path = staging / folder
        cfg.output_path = str(path)
        if cfg.checkpoint_path is not None:
            cfg.checkpoint_path = str(Path(cfg.checkpoint_path) / run_id / folder)
        # every SAE starts from the same seed and sees the same samples
        torch.manual_seed(synthetic_model.cfg.seed or 0)
        logger.info(f"Training {name} on the synthetic model")
        runner = SyntheticSAERunner(cfg, override_synthetic_model=synthetic_model)
        keep_configs_of_run([runner.sae])
        with wandb_run(cfg):
            sae = runner.run().sae
        calibration = calibrate(sae, _samples(synthetic_model, cfg.batch_size), samples.calibration)
        sae.save_inference_model(path)  # again, now with the calibrated threshold
        put_sparsity_in_order(path, sae)
        levels = measure_saved(path, _samples(synthetic_model, cfg.batch_size), samples.measuring, cfg.device)
        scores = score_on_synthetic_model(
            SAE.load_from_disk(path, device=cfg.device), synthetic_model, cfg.eval_samples
        )
        trained.append(TrainedSAE(name, path, calibration, levels, scores))
    scores_by_name = {sae.name: sae.scores for sae in trained if sae.scores is not None}
    write_csv(staging / SCORES_FILENAME, [{"sae": name, **asdict(s)} for name, s in scores_by_name.items()])
    plot_scores(scores_by_name, staging / SCORES_FIGURE_FILENAME)
    return trained


def _samples(synthetic_model: SyntheticModel, batch_size: int) -> Iterator[Tensor]:
    while True:
        yield synthetic_model.sample(batch_size)
