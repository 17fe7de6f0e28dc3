"""What there is to see of a saved SAE, from its files alone: neither SAELens nor the SAE itself is needed for it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from sae_lens_matryoshka.errors import UserError
from sae_lens_matryoshka.levels import SAVED_AS, level_widths
from sae_lens_matryoshka.saelens_fields import tables
from sae_lens_matryoshka.saved.checks import (
    CFG_FILENAME,
    WEIGHTS_FILENAME,
    check_finite,
    check_saved_sae,
    config_as_saelens_6,
)
from sae_lens_matryoshka.saved.level_figures import LevelMetrics, read_level_figures


@dataclass(frozen=True)
class SAESummary:
    """A saved SAE as ``inspect`` shows it."""

    architecture: str
    """The SAELens architecture that it is saved as."""

    cfg: dict[str, Any]
    """Its config, as SAELens 6 has it."""

    widths: list[int]
    """The number of latents of each level, smallest level first."""

    threshold: Tensor | None
    """What latents must exceed to fire, shape (d_sae,); None for architectures without learned thresholds."""

    figures: list[LevelMetrics]
    """The figures of its levels; empty if they have not been measured, or are of other levels."""

    @property
    def metadata(self) -> dict[str, Any]:
        """What the SAE records of where it is from."""
        return self.cfg.get("metadata") or {}

    def firing_rule(self, level: int) -> str:
        """What a level's own latents must do to fire."""
        width = self.widths[level]
        if self.architecture == "topk":
            k = self.cfg.get("k", tables().saved["topk"]["k"].default)  # SAELens loads it with its default
            return f"the {min(k, width)} largest"
        if self.threshold is None:
            return "above 0"
        own = self.threshold[self.widths[level - 1] if level else 0 : width].float()
        return f"{own.min():.4g} / {own.median():.4g} / {own.max():.4g}"


def find_saves(path: Path) -> list[Path]:
    """The folders of saved SAEs at a path or anywhere below it; checkpoints are none."""
    folders = sorted(cfg.parent for cfg in path.rglob(CFG_FILENAME) if (cfg.parent / WEIGHTS_FILENAME).is_file())
    return [folder for folder in folders if not (folder / "trainer_state.pt").is_file()]


def summarize_folder(folder: Path, widths: Sequence[int] | None = None) -> SAESummary:
    """Look at the SAE that is saved in a folder; ``widths`` are those of its levels, where it does not record them.

    Raises:
        UserError: If files are missing, damaged or contradict each other, or its architecture has no levels.
        ValueError: If the widths are neither given nor recorded, contradict those, or do not fit the SAE.
    """
    cfg = config_as_saelens_6(check_saved_sae(folder))
    tensors = load_file(folder / WEIGHTS_FILENAME)
    check_finite(tensors.items())
    return summarize(cfg, tensors.get("threshold"), widths, read_level_figures(folder))


def summarize(
    cfg: dict[str, Any],
    threshold: Tensor | None,
    widths: Sequence[int] | None = None,
    figures: Sequence[LevelMetrics] = (),
) -> SAESummary:
    """Put together what is known of an SAE.

    Args:
        cfg: Its config, as SAELens 6 has it.
        threshold: What latents must exceed to fire, shape (d_sae,), if it has that.
        widths: The widths of its levels, where it does not record them.
        figures: The figures of its levels.

    Raises:
        UserError: If its architecture has no levels.
        ValueError: If the widths are neither given nor recorded, contradict those, or do not fit the SAE.
    """
    plain = {ours: plain for plain, ours in SAVED_AS.items()}
    architecture = plain.get(cfg["architecture"], cfg["architecture"])
    if architecture not in SAVED_AS:
        raise UserError(f"SAEs of the architectures {', '.join(SAVED_AS)} have levels, not those of {architecture!r}.")
    widths = level_widths(cfg, widths)
    fitting = [level.width for level in figures] == widths
    return SAESummary(architecture, cfg, widths, threshold, list(figures) if fitting else [])
