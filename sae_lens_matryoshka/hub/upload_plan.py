"""What a push will write, decided before anything is sent: files by their paths in the repository, and their contents.

Layout and file names are those of SAELens's own uploader, ``upload_saes_to_huggingface``: a folder an SAE with
``cfg.json``, ``sae_weights.safetensors`` and, where there are, ``sparsity.safetensors`` and ``runner_cfg.json``. Levels
that are published as SAEs of their own and figures lie in folders below it.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME
from sae_lens.registry import SAE_CLASS_REGISTRY

from sae_lens_matryoshka.errors import UserError
from sae_lens_matryoshka.hub.hub_names import hub_dataset, hub_model
from sae_lens_matryoshka.hub.local_paths import Replacement, without_local_paths
from sae_lens_matryoshka.hub.model_card import CardEntry
from sae_lens_matryoshka.hub.results import read_results
from sae_lens_matryoshka.hub.saved_saes import SavedSAE
from sae_lens_matryoshka.saes.matryoshka_sae import MatryoshkaSAE

SAE_FILENAMES = (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME, RUNNER_CFG_FILENAME)


@dataclass
class UploadPlan:
    """The files of a push and what the card will say about them."""

    files: dict[str, Path | bytes] = field(default_factory=dict)
    """Contents by path in the repository, the card left out."""

    entries: list[CardEntry] = field(default_factory=list)
    """The SAEs, for the card."""

    replacements: list[Replacement] = field(default_factory=list)
    """What is published otherwise than it stands on disk."""

    levels_size: int = 0
    """Bytes of the files of levels that are published as SAEs of their own."""

    def size(self, path: str) -> int:
        """Bytes of a file."""
        content = self.files[path]
        return len(content) if isinstance(content, bytes) else content.stat().st_size


def plan_upload(
    saes: list[SavedSAE], scratch: Path, levels: bool = False, results: str | Path | None = None
) -> UploadPlan:
    """Decide what to upload.

    Args:
        saes: The SAEs to publish.
        scratch: A folder for files that have to be made; it must outlive the plan.
        levels: Whether to publish each level as an SAE of its own too. The last level is the SAE itself.
        results: A folder of benchmark results, or None.

    Raises:
        UserError: If the results cannot be read, or ``levels`` is asked for an SAE that has none.
    """
    plan = UploadPlan()
    for saved in saes:
        _plan_sae(plan, saved, scratch)
        level_ids = _plan_levels(plan, saved, scratch) if levels else []
        rows, figures = _plan_results(plan, saved, results, len(saes) == 1)
        metadata = saved.cfg.get("metadata") or saved.cfg
        plan.entries.append(
            CardEntry(
                saved.sae_id,
                json.loads(_contents(plan, f"{saved.sae_id}/{SAE_CFG_FILENAME}")),
                saved.run_settings,
                saved.widths,
                saved.level_figures,
                level_ids,
                rows,
                figures,
                hub_model(metadata.get("model_name"), saved.replacements),
                hub_dataset(metadata.get("dataset_path"), saved.replacements),
            )
        )
        plan.replacements += saved.replacements
    return plan


def obsolete_files(plan: UploadPlan, existing: list[str]) -> list[str]:
    """The files of an earlier push of the same SAEs that this push does not write, such as levels of other widths.

    Only what a push writes is named; everything else in a repository is left alone.

    Args:
        plan: The push.
        existing: The paths of all files of the repository.
    """
    names = "|".join(map(re.escape, SAE_FILENAMES))
    written = re.compile(rf"((level_\d+_width_\d+/)?({names})|figures/[^/]+\.png)")
    return [
        path
        for path in existing
        if path not in plan.files
        and any(
            path.startswith(f"{entry.sae_id}/") and written.fullmatch(path.removeprefix(f"{entry.sae_id}/"))
            for entry in plan.entries
        )
    ]


def _plan_sae(plan: UploadPlan, saved: SavedSAE, scratch: Path) -> None:
    sae_class = SAE_CLASS_REGISTRY[saved.cfg.get("architecture", "standard")][0]
    if sae_class.__module__.startswith("sae_lens."):
        cfg, weights = saved.cfg, saved.folder / SAE_WEIGHTS_FILENAME
    else:  # SAELens alone does not know our architecture, but the full level is an SAE that it knows
        sae = MatryoshkaSAE.load_from_disk(saved.folder).at_level(-1)
        delattr(sae.cfg.metadata, "matryoshka_cut_from")
        weights, cfg_path = sae.save_model(scratch / saved.sae_id)
        cfg = without_local_paths(json.loads(cfg_path.read_text(encoding="utf-8")), "", [])
    plan.files[f"{saved.sae_id}/{SAE_CFG_FILENAME}"] = _json(cfg)
    plan.files[f"{saved.sae_id}/{SAE_WEIGHTS_FILENAME}"] = weights
    if (saved.folder / SPARSITY_FILENAME).is_file():
        plan.files[f"{saved.sae_id}/{SPARSITY_FILENAME}"] = saved.folder / SPARSITY_FILENAME
    if saved.runner_cfg is not None:
        plan.files[f"{saved.sae_id}/{RUNNER_CFG_FILENAME}"] = _json(saved.runner_cfg)


def _plan_levels(plan: UploadPlan, saved: SavedSAE, scratch: Path) -> list[str]:
    """Cut out all levels but the last, and return the ids of all."""
    if saved.widths is None:
        raise UserError(f"{saved.folder} does not record levels, so they cannot be published as SAEs of their own.")
    sae = MatryoshkaSAE.load_from_disk(saved.folder)
    ids: list[str] = []
    for level, width in enumerate(saved.widths[:-1]):
        level_id = f"{saved.sae_id}/level_{level}_width_{width}"
        weights, cfg_path = sae.at_level(level).save_model(scratch / level_id)
        cfg = without_local_paths(json.loads(cfg_path.read_text(encoding="utf-8")), "", [])
        files: dict[str, Path | bytes] = {SAE_CFG_FILENAME: _json(cfg), SAE_WEIGHTS_FILENAME: weights}
        for name, content in files.items():
            plan.files[f"{level_id}/{name}"] = content
            plan.levels_size += plan.size(f"{level_id}/{name}")
        ids.append(level_id)
    return [*ids, saved.sae_id]


def _plan_results(
    plan: UploadPlan, saved: SavedSAE, results: str | Path | None, only_sae: bool
) -> tuple[list[dict[str, str]], list[str]]:
    """Add the figures, and return the rows for the card and the figures' paths in the repository."""
    if results is None:
        return [], []
    found = read_results(results, (saved.sae_id, saved.folder.resolve().name), only_sae)
    paths: list[str] = []
    for figure in found.figures:
        paths.append(f"{saved.sae_id}/figures/{re.sub(r'[^A-Za-z0-9_.-]+', '_', figure.name)}")
        plan.files[paths[-1]] = figure
    return without_local_paths(found.rows, "results.csv: ", plan.replacements), paths


def _contents(plan: UploadPlan, path: str) -> bytes:
    content = plan.files[path]
    return content if isinstance(content, bytes) else content.read_bytes()


def _json(contents: dict[str, Any]) -> bytes:
    return json.dumps(contents, indent=2).encode()
