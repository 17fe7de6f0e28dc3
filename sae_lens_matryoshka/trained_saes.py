"""What a run does with every SAE it has trained, whatever it was trained on: calibrate, save in order, measure."""

import copy
import csv
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from sae_lens import SAE, BatchTopKTrainingSAE, TrainingSAE
from sae_lens.constants import SPARSITY_FILENAME
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_lens_matryoshka.calibration import ThresholdCalibration, calibrate_threshold
from sae_lens_matryoshka.level_metrics import LevelMetrics, measure_levels
from sae_lens_matryoshka.levels import recorded_widths
from sae_lens_matryoshka.saes.matryoshka_sae import MatryoshkaSAE
from sae_lens_matryoshka.saes.matryoshka_sae_kinds import KINDS
from sae_lens_matryoshka.saes.nested_training_sae import NestedTrainingSAE
from sae_lens_matryoshka.synthetic_benchmark import SyntheticScores

LEVELS_FILENAME = "levels.csv"

DEFAULT_SAMPLES = 100_000
"""How many fresh activations to calibrate and to measure on, unless the user says otherwise."""


class Samples(NamedTuple):
    """How many fresh activations are used for what."""

    calibration: int
    measuring: int


@dataclass(frozen=True)
class TrainedSAE:
    """One SAE that a run has trained and saved."""

    name: str
    """Its name in the run file; ``sae`` where there is only one."""

    path: Path
    """The folder it was saved to."""

    calibration: ThresholdCalibration | None
    """What the calibration changed; None for architectures that need none, and if the run was finished already."""

    levels: list[LevelMetrics]
    """Figures of the saved SAE, a level each; empty for architectures without levels."""

    scores: SyntheticScores | None = None
    """How well the features of the synthetic model were found; None for language models."""


def calibrate(
    sae: TrainingSAE[Any], activations: Iterable[Tensor], calibration_samples: int
) -> ThresholdCalibration | None:
    """Calibrate the running threshold of BatchTopK, and record on how many samples, 0 for none.

    Returns:
        What that changed; None if there is nothing to calibrate, or not asked for.
    """
    if not isinstance(sae, BatchTopKTrainingSAE):
        return None
    sae.cfg.metadata.calibration_samples = calibration_samples
    return calibrate_threshold(sae, activations, calibration_samples) if calibration_samples > 0 else None


def keep_configs_of_run(saes: Iterable[TrainingSAE[Any]]) -> None:
    """SAELens edits an SAE's config when it folds its normalization in, and would record that as the run's."""
    for sae in saes:
        sae.cfg = copy.deepcopy(sae.cfg)


def measure_saved(path: Path, activations: Iterable[Tensor], n_samples: int, device: str) -> list[LevelMetrics]:
    """Measure what was saved, read back as a user would, and write the figures beside it."""
    sae = SAE.load_from_disk(path, device=device)
    if sae.cfg.architecture() not in KINDS:
        return []
    widths = recorded_widths(sae.cfg.to_dict()) or [sae.cfg.d_sae]
    levels = measure_levels(MatryoshkaSAE.from_sae(sae, widths), activations, n_samples)
    write_csv(path / LEVELS_FILENAME, [asdict(level) for level in levels])
    return levels


def read_finished(name: str, folder: Path) -> TrainedSAE:
    """What a run that has been finished left of an SAE, its levels as they were measured then."""
    types = get_type_hints(LevelMetrics)
    levels: list[LevelMetrics] = []
    if (folder / LEVELS_FILENAME).is_file():
        with (folder / LEVELS_FILENAME).open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        levels = [LevelMetrics(**{key: types[key](value) for key, value in row.items()}) for row in rows]
    return TrainedSAE(name, folder, None, levels)


def put_sparsity_in_order(path: Path, sae: TrainingSAE[Any]) -> None:
    """SAELens saves its statistics in the order of training; a saved SAE's latents may have been put in another."""
    order = sae.latent_order if isinstance(sae, NestedTrainingSAE) else None
    if order is not None:
        sparsity = {name: values[order.cpu()] for name, values in load_file(path / SPARSITY_FILENAME).items()}
        save_file(sparsity, path / SPARSITY_FILENAME)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows with the same keys as a table."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
