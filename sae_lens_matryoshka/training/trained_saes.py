"""What a run does with every SAE it has trained and saved, whatever it was trained on: calibrate it, measure it."""

import copy
import logging
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from sae_lens import SAE, BatchTopKTrainingSAE, TrainingSAE
from sae_lens.constants import SPARSITY_FILENAME
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_lens_matryoshka.levels import SAVED_AS, recorded_widths
from sae_lens_matryoshka.measuring.calibration import ThresholdCalibration, calibrate_threshold
from sae_lens_matryoshka.measuring.level_metrics import measure_levels
from sae_lens_matryoshka.measuring.synthetic_scores import SyntheticScores
from sae_lens_matryoshka.saes.loading import load_any
from sae_lens_matryoshka.saes.matryoshka_sae import MatryoshkaSAE
from sae_lens_matryoshka.saes.nested_training_sae import NestedTrainingSAE
from sae_lens_matryoshka.saved.checks import read_config
from sae_lens_matryoshka.saved.level_figures import LevelMetrics, read_level_figures, write_level_figures
from sae_lens_matryoshka.training.output_folders import CALIBRATING_PREFIX

logger = logging.getLogger(__name__)

CALIBRATION_SAMPLES = "calibration_samples"
"""Where the metadata of a saved BatchTopK SAE say on how many samples its threshold was calibrated; None: not yet."""

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

    incomplete: str | None = None
    """What could not be made of it, why, and how to make up for it; None if nothing is missing."""

    def load(self, device: str = "cpu") -> SAE[Any]:
        """The saved SAE, calibrated, with its levels if it is a Matryoshka SAE.

        Args:
            device: The device to load to.
        """
        return load_any(self.path, device=device)


@dataclass(frozen=True)
class SavedSAE:
    """An SAE that has been trained and saved, and is yet to be calibrated and measured."""

    name: str
    """Its name in the run file; ``sae`` where there is only one."""

    folder: str
    """Its folder in the output; empty for the output itself."""

    activations: Callable[[], Iterable[Tensor]]
    """Gives fresh activations as the saved SAE takes them, batches of shape (batch, d_in)."""

    device: str
    """Where to compute."""

    score: Callable[[SAE[Any]], SyntheticScores] | None = None
    """Scores the SAE against known features; None where there are none."""


def complete(saved: SavedSAE, output: Path, samples: Samples) -> TrainedSAE:
    """Calibrate a saved SAE and measure its levels, which are additions: where they fail, the SAE stands.

    Args:
        saved: The SAE.
        output: The run's output.
        samples: How many activations to use.
    """
    path = output / saved.folder
    done = TrainedSAE(saved.name, path, None, [])
    step = "calibrated"
    try:
        if _calibrated_on(read_config(path)) is None:
            done = replace(done, calibration=_calibrate_saved(path, saved, samples.calibration))
        step = "measured"
        done = replace(done, levels=_measure_saved(path, saved, samples.measuring))
        step = "scored"
        if saved.score is not None:
            done = replace(done, scores=saved.score(SAE.load_from_disk(path, device=saved.device)))
    except (Exception, KeyboardInterrupt) as error:
        is_interrupted = isinstance(error, KeyboardInterrupt)
        why = "interrupted" if is_interrupted else " ".join(str(error).split()) or type(error).__name__
        incomplete = (
            f"The SAE is saved in {path}, but has not been {step} ({why}); the same command with "
            f"{'--resume auto' if saved.score is None else '--force'} makes up for it."
        )
        logger.warning(incomplete)
        if is_interrupted:
            raise
        done = replace(done, incomplete=incomplete)
    return done


def is_complete(path: Path, measure_samples: int | None = None) -> bool:
    """Whether a saved SAE has been calibrated and measured, as far as its architecture asks for it.

    Args:
        path: Its folder.
        measure_samples: On how many samples it must have been measured; None takes any number.
    """
    cfg = read_config(path)
    if cfg["architecture"] not in SAVED_AS:
        return True
    levels = read_level_figures(path)
    is_measured = bool(levels) and all(measure_samples in (None, level.n_samples) for level in levels)
    return is_measured and _calibrated_on(cfg) is not None


def _calibrated_on(cfg: Mapping[str, Any]) -> int | None:
    """On how many samples a saved SAE's threshold was calibrated: 0 if it wants none, None if not yet."""
    return (cfg.get("metadata") or {}).get(CALIBRATION_SAMPLES, 0)


def _calibrate_saved(path: Path, saved: SavedSAE, n_samples: int) -> ThresholdCalibration | None:
    """Move the thresholds of a saved SAE, and record on how many samples, 0 for none."""
    sae: Any = SAE.load_from_disk(path, device=saved.device)
    calibration = calibrate_threshold(sae, saved.activations(), n_samples) if n_samples > 0 else None
    setattr(sae.cfg.metadata, CALIBRATION_SAMPLES, n_samples)
    with tempfile.TemporaryDirectory(dir=path, prefix=CALIBRATING_PREFIX) as folder:
        for file in sae.save_model(folder):
            Path(file).replace(path / Path(file).name)
    return calibration


def _measure_saved(path: Path, saved: SavedSAE, n_samples: int) -> list[LevelMetrics]:
    """Measure what was saved, read back as a user would, and write the figures beside it."""
    sae = SAE.load_from_disk(path, device=saved.device)
    if sae.cfg.architecture() not in SAVED_AS:
        return []
    widths = recorded_widths(sae.cfg.to_dict()) or [sae.cfg.d_sae]
    levels = measure_levels(MatryoshkaSAE.from_sae(sae, widths), saved.activations(), n_samples)
    write_level_figures(path, levels)
    return levels


def prepare_configs(saes: Iterable[TrainingSAE[Any]]) -> None:
    """Give SAEs that are about to be trained configs of their own, where those saved say that they want calibrating.

    SAELens edits an SAE's config when it folds its normalization in, and would record that as the run's.
    """
    for sae in saes:
        sae.cfg = copy.deepcopy(sae.cfg)
        if isinstance(sae, BatchTopKTrainingSAE):
            setattr(sae.cfg.metadata, CALIBRATION_SAMPLES, None)


def put_sparsity_in_order(path: Path, sae: TrainingSAE[Any]) -> None:
    """SAELens saves its statistics in the order of training; a saved SAE's latents may have been put in another."""
    order = sae.latent_order if isinstance(sae, NestedTrainingSAE) else None
    if order is not None:
        sparsity = {name: values[order.cpu()] for name, values in load_file(path / SPARSITY_FILENAME).items()}
        save_file(sparsity, path / SPARSITY_FILENAME)
