"""Training on from an SAE that is there, SAELens's ``from_pretrained_path``.

The run file's ``sae`` says what is trained, as for a new SAE; the weights come from a folder, which is a saved SAE or
the SAE of a checkpoint. SAELens itself takes everything from the folder, and what it finds in a saved Matryoshka SAE is
a JumpReLU SAE without levels.

The data's way: folder -> SAE of the class that it was made by -> compared with the run file -> state of the class that
is trained -> SAE of that class. The optimizer's state stays behind, since it belongs to another run's schedule.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    JumpReLUTrainingSAEConfig,
    SAETrainer,
    TopKTrainingSAEConfig,
    TrainingSAE,
    TrainingSAEConfig,
)
from sae_lens.constants import ACTIVATION_SCALER_CFG_FILENAME, SAE_CFG_FILENAME
from torch import Tensor

from sae_lens_matryoshka.errors import ConfigError, UserError
from sae_lens_matryoshka.levels import recorded_widths
from sae_lens_matryoshka.normalization import CHANNEL_STANDARDIZATION, COVARIANCE_WHITENING
from sae_lens_matryoshka.saes.kinds import KINDS
from sae_lens_matryoshka.saes.matryoshka_sae import MatryoshkaSAE
from sae_lens_matryoshka.saes.nested_training_sae import NestedTrainingSAE
from sae_lens_matryoshka.saved.checks import check_finite, check_saved_sae, loading_errors, read_json
from sae_lens_matryoshka.training.resuming.manifest import MANIFEST_FILENAME, find_damage

_SCALED = "expected_average_only_in"
_WHITENED = (COVARIANCE_WHITENING, CHANNEL_STANDARDIZATION)
"""Normalizations that are estimated at the start of training and folded into the weights at its end."""


@dataclass(frozen=True)
class StartingPoint:
    """An SAE to train on from."""

    sae: TrainingSAE[Any]
    """The SAE, of the class and with the config that the run file asks for."""

    scaler_path: Path | None
    """The file with the estimated normalization that the weights were trained with; None if there was none."""

    reads_raw_activations: bool
    """Whether the weights are for activations as they are, while the run normalizes them by an estimated factor."""

    def prepare(self, trainer: SAETrainer[Any, Any]) -> None:
        """Bring weights and normalization together before the first step.

        A normalization that a checkpoint has estimated is kept. One that was folded into a saved SAE's weights is
        estimated as SAELens would, and taken out of the weights: the SAE then does with normalized activations what it
        did with those as they are.
        """
        if self.scaler_path is not None:
            trainer.activation_scaler.load(self.scaler_path)
        if not self.reads_raw_activations:
            return
        trainer.activation_scaler.estimate_scaling_factor(
            self.sae.cfg.d_in, trainer.data_provider, trainer.cfg.n_batches_for_norm_estimate
        )
        scaling_factor = trainer.activation_scaler.scaling_factor
        assert scaling_factor is not None
        cfg = self.sae.cfg
        self.sae.cfg = copy.copy(cfg)  # folding edits it
        self.sae.fold_activation_norm_scaling_factor(1 / scaling_factor)
        self.sae.cfg = cfg


def load_starting_point(path: str, cfg: TrainingSAEConfig) -> StartingPoint:
    """Load an SAE to train on from.

    Where it was made by the architecture that is trained, and is a checkpoint's, its state is taken as it stands.
    Otherwise the state is that of the saved form: decoder norms and order of latents as SAELens and this plugin save
    them. Thresholds of a JumpReLU SAE start learned thresholds as they are, and BatchTopK's running one as their mean.
    Ours then averages over this run's batches alone, since only they are selected with this run's ``k``.

    Args:
        path: The folder, as ``from_pretrained_path`` gives it.
        cfg: What the run file asks for.

    Raises:
        ConfigError: If there is no SAE, it cannot be loaded whole, or the run file asks for something that its weights
            cannot be trained as; the message names the field.
    """
    folder = Path(path).expanduser()
    try:
        source, is_checkpoint = _load(folder)
        _check_agrees(source, cfg)
        scaler_path = _check_normalization(source, is_checkpoint, cfg, folder)
        state = _state(source, cfg)
        with loading_errors(str(folder)):
            sae = TrainingSAE.load_from_disk(folder, converter=lambda *_, **__: (cfg.to_dict(), state))
    except UserError as error:
        raise ConfigError(f"from_pretrained_path={path!r}: {error}") from error
    if isinstance(sae, BatchTopKTrainingSAE):  # SAELens has cast its float64 to the dtype of the parameters
        sae.topk_threshold = state["topk_threshold"].double()
    reads_raw_activations = cfg.normalize_activations == _SCALED and source.cfg.normalize_activations == "none"
    return StartingPoint(sae, scaler_path, reads_raw_activations)


def _load(folder: Path) -> tuple[SAE[Any], bool]:
    """The SAE in a folder as the class that it was made by, and whether it is a checkpoint's."""
    if not folder.is_dir():
        raise UserError("there is no such folder; give that of a saved SAE or of a checkpoint.")
    if not (folder / SAE_CFG_FILENAME).is_file():
        inner = sorted(cfg.parent.name for cfg in folder.glob(f"*/{SAE_CFG_FILENAME}"))
        several = f", but {', '.join(inner)} in it {'has' if len(inner) == 1 else 'have'}" if inner else ""
        raise UserError(f"this is not an SAE: it has no {SAE_CFG_FILENAME}{several}.")
    for holder in (folder, folder.parent):  # of several SAEs in a checkpoint, each has a folder
        if (holder / MANIFEST_FILENAME).is_file() and (damage := find_damage(holder)):
            raise UserError(f"the checkpoint {holder} is damaged: {damage}.")
    # a field of all training configs in SAELens, and of no other
    is_checkpoint = "decoder_init_norm" in read_json(folder / SAE_CFG_FILENAME)
    if not is_checkpoint:
        check_saved_sae(folder)
    with loading_errors(str(folder)):
        source: SAE[Any] = TrainingSAE.load_from_disk(folder) if is_checkpoint else SAE.load_from_disk(folder)
    check_finite(source.named_parameters())
    return source, is_checkpoint


def _check_agrees(source: SAE[Any], cfg: TrainingSAEConfig) -> None:
    """Refuse fields that say otherwise of the weights than they are."""
    made_as, wanted = _saved_architecture(source), cfg.get_inference_config_class().architecture()
    # what selects the k largest latents can do so with any encoder
    if made_as != wanted and not (isinstance(cfg, TopKTrainingSAEConfig) and {made_as, wanted} <= set(KINDS)):
        trained_as = source.cfg.metadata.training_architecture
        raise UserError(
            f"sae.architecture={cfg.architecture()!r} cannot train the weights of a {made_as} SAE on"
            f"{f'; it was trained as {trained_as!r}' if trained_as else ''}."
        )
    details = source.cfg.metadata.training_architecture_details or {}
    recorded = {"rescale_acts_by_decoder_norm": details.get("rescale_acts_by_decoder_norm"), **source.cfg.to_dict()}
    fields = ["d_in", "d_sae", "apply_b_dec_to_input"]
    # saved SAEs that were selected by decoder norm have them folded in, so that both ways of selecting are the same
    if recorded["rescale_acts_by_decoder_norm"] is False:
        fields.append("rescale_acts_by_decoder_norm")
    if widths := recorded_widths(recorded):
        recorded["matryoshka_widths"] = widths
        fields.append("matryoshka_widths")
    for field in fields:
        value = getattr(cfg, field, recorded[field])  # of other architectures, what they lack does not matter
        if value != recorded[field]:
            fix = f"set sae.{field}={recorded[field]}"
            raise UserError(f"sae.{field}={value!r}, but these weights have {recorded[field]!r}; {fix}.")


def _check_normalization(source: SAE[Any], is_checkpoint: bool, cfg: TrainingSAEConfig, folder: Path) -> Path | None:
    """Refuse a normalization that the weights do not fit; where a checkpoint has estimated it, return that file."""
    made_with, wanted = source.cfg.normalize_activations, cfg.normalize_activations
    if made_with == wanted and wanted in (_SCALED, *_WHITENED):
        scaler_path = folder / ACTIVATION_SCALER_CFG_FILENAME
        if scaler_path.is_file():
            return scaler_path
        if is_checkpoint or wanted in _WHITENED:
            raise UserError(
                f"{ACTIVATION_SCALER_CFG_FILENAME} is missing, which says how activations were normalized for them."
            )
    folded = made_with == "none" and wanted == _SCALED
    if made_with != wanted and not folded:
        raise UserError(
            f"sae.normalize_activations={wanted!r}, but these weights are for activations as {made_with!r} gives them; "
            f"set sae.normalize_activations={made_with}."
        )
    return None


def _state(source: SAE[Any], cfg: TrainingSAEConfig) -> dict[str, Tensor]:
    """The tensors of an SAE by the names of the class that is trained."""
    state = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    if isinstance(source, TrainingSAE):
        form = ("rescale_acts_by_decoder_norm", "order_latents_by")
        same_form = all(getattr(source.cfg, field, None) == getattr(cfg, field, None) for field in form)
        if source.cfg.architecture() == cfg.architecture() and same_form:
            if isinstance(source, NestedTrainingSAE):
                state |= {n: value for n, value in source.statistics.items() if n != "topk_threshold_updates"}
            return state
        source.process_state_dict_for_saving_inference(state)
    threshold = state.pop("threshold", None)
    if threshold is not None and not threshold.isfinite().all():
        raise UserError(f"{int((~threshold.isfinite()).sum())} latents can never fire: their threshold is infinite.")
    if isinstance(cfg, JumpReLUTrainingSAEConfig) and threshold is not None:
        state["threshold"] = threshold.float()
    if isinstance(cfg, BatchTopKTrainingSAEConfig):
        scores = threshold if threshold is not None else state["b_enc"].new_zeros(1)
        if cfg.rescale_acts_by_decoder_norm:
            scores = scores * state["W_dec"].norm(dim=-1)
        state["topk_threshold"] = scores.double().mean()
    return state


def _saved_architecture(source: SAE[Any]) -> str:
    if isinstance(source, MatryoshkaSAE):
        return source.saved_architecture()
    if isinstance(source, TrainingSAE):
        return source.cfg.get_inference_config_class().architecture()
    return source.cfg.architecture()
