"""What a push will write, decided before anything is sent: files by their paths in the repository, and their contents.

Layout and file names are those of SAELens's own uploader, ``upload_saes_to_huggingface``: a folder an SAE with
``cfg.json``, ``sae_weights.safetensors`` and, where there are, ``sparsity.safetensors`` and ``runner_cfg.json``. Levels
that are published as SAEs of their own and figures lie in folders below it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd
from sae_lens import SAE
from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME
from sae_lens.registry import SAE_CLASS_REGISTRY

from sae_lens_matryoshka.errors import UserError
from sae_lens_matryoshka.hub.model_card import CardEntry, listed_figures
from sae_lens_matryoshka.hub.own_files import read_png, read_sparsity, weights_alone
from sae_lens_matryoshka.hub.privacy import Replacement
from sae_lens_matryoshka.hub.results import RESULTS_FILENAME, check_measured_on, read_results
from sae_lens_matryoshka.hub.saved_saes import SAE_FILENAMES, SavedSAE
from sae_lens_matryoshka.saes.matryoshka_sae import MatryoshkaSAE


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

    with_levels: bool = False
    """Whether levels that were published before are replaced."""

    with_results: bool = False
    """Whether benchmark results that were published before are replaced."""

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
    plan = UploadPlan(with_levels=levels, with_results=results is not None)
    for saved in saes:
        cfg = _plan_sae(plan, saved, scratch)
        level_ids = _plan_levels(plan, saved, scratch) if levels else []
        rows, figures = _plan_results(plan, saved, results, len(saes) == 1)
        added = {"cfg": cfg, "level_ids": level_ids, "results": rows, "figures": figures}
        plan.entries.append(replace(saved.entry, **added, keeps_results=results is None))
        # what is cut out or converted holds the same metadata again
        plan.replacements += dict.fromkeys(saved.privacy.replacements)
    return plan


def keep_what_stays(plan: UploadPlan, existing: Mapping[str, str | None], card: str | None) -> list[str]:
    """Find out what of an earlier push of the same SAEs goes on being true, and what is to be removed.

    Levels that were published as SAEs of their own stay, and are named in the card, as long as they are those of the
    same weights. Results stay until others are published; the card says if they were measured on other weights.
    Nothing is removed but what a push has written: the SAE's own files, its levels, the figures that its card shows.

    Args:
        plan: The push, whose entries are completed.
        existing: The SHA-256 of every file of the repository by path, or None where the Hub does not tell.
        card: The repository's model card, or None.

    Returns:
        The files to remove.
    """
    obsolete: list[str] = []
    shown = listed_figures(card)
    for index, entry in enumerate(plan.entries):
        weights = f"{entry.sae_id}/{SAE_WEIGHTS_FILENAME}"
        is_same = existing.get(weights) == _sha256(plan.files[weights])
        levels = _level_ids(entry.sae_id, entry.widths or [])
        if not is_same or plan.with_levels or any(f"{level}/{SAE_CFG_FILENAME}" not in existing for level in levels):
            levels = []
        files = "|".join(map(re.escape, SAE_FILENAMES))
        written = re.compile(rf"{re.escape(entry.sae_id)}(/level_[0-9]+_width_[0-9]+)?/({files})")
        replaced = [path for path in existing if written.fullmatch(path) and path.rpartition("/")[0] not in levels]
        if plan.with_results:
            replaced += [path for path in shown.get(entry.sae_id, []) if path.startswith(f"{entry.sae_id}/figures/")]
        obsolete += [path for path in dict.fromkeys(replaced) if path in existing and path not in plan.files]
        plan.entries[index] = replace(
            entry,
            level_ids=[*levels, entry.sae_id] if levels else entry.level_ids,
            replaces_weights=weights in existing and not is_same,
        )
    return obsolete


def _level_ids(sae_id: str, widths: Sequence[int]) -> list[str]:
    """The ids of the levels that are published as SAEs of their own; the last is the SAE itself."""
    return [f"{sae_id}/level_{level}_width_{width}" for level, width in enumerate(widths[:-1])]


def _sha256(content: Path | bytes) -> str:
    return CommitOperationAdd("of-a-file", content).upload_info.sha256.hex()


def _plan_sae(plan: UploadPlan, saved: SavedSAE, scratch: Path) -> dict[str, Any]:
    """Add the SAE itself, and return its config as it is published."""
    cfg, sae_id = saved.entry.cfg, saved.entry.sae_id
    sae_class = SAE_CLASS_REGISTRY[cfg.get("architecture", "standard")][0]
    if sae_class.__module__.startswith("sae_lens."):
        weights = weights_alone(saved.folder / SAE_WEIGHTS_FILENAME, scratch / sae_id)
    else:  # SAELens alone does not know our architecture, but the full level is an SAE that it knows
        sae = MatryoshkaSAE.load_from_disk(saved.folder).at_level(-1)
        delattr(sae.cfg.metadata, "matryoshka_cut_from")
        weights, cfg = _save(sae, saved, scratch / sae_id)
    plan.files[f"{sae_id}/{SAE_CFG_FILENAME}"] = _json(cfg)
    plan.files[f"{sae_id}/{SAE_WEIGHTS_FILENAME}"] = weights
    if (saved.folder / SPARSITY_FILENAME).is_file():
        sparsity = read_sparsity(saved.folder / SPARSITY_FILENAME, cfg["d_sae"])
        plan.files[f"{sae_id}/{SPARSITY_FILENAME}"] = sparsity
    if saved.runner_cfg is not None:
        plan.files[f"{sae_id}/{RUNNER_CFG_FILENAME}"] = _json(saved.runner_cfg)
    return cfg


def _plan_levels(plan: UploadPlan, saved: SavedSAE, scratch: Path) -> list[str]:
    """Cut out all levels but the last, and return the ids of all."""
    if saved.entry.widths is None:
        raise UserError(f"{saved.folder} does not record levels, so they cannot be published as SAEs of their own.")
    sae = MatryoshkaSAE.load_from_disk(saved.folder)
    ids = _level_ids(saved.entry.sae_id, saved.entry.widths)
    for level, level_id in enumerate(ids):
        weights, cfg = _save(sae.at_level(level), saved, scratch / level_id)
        files: dict[str, Path | bytes] = {SAE_CFG_FILENAME: _json(cfg), SAE_WEIGHTS_FILENAME: weights}
        for name, content in files.items():
            plan.files[f"{level_id}/{name}"] = content
            plan.levels_size += plan.size(f"{level_id}/{name}")
    return [*ids, saved.entry.sae_id]


def _save(sae: SAE[Any], saved: SavedSAE, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Save what was made of an SAE; returns its weights and what is published of its config."""
    weights, cfg_path = sae.save_model(folder)
    cfg = json.loads(cfg_path.read_text(encoding="utf-8"))
    return Path(weights), saved.privacy.contents(cfg, f"{SAE_CFG_FILENAME}: ")


def _plan_results(
    plan: UploadPlan, saved: SavedSAE, results: str | Path | None, only_sae: bool
) -> tuple[list[dict[str, str]], list[str]]:
    """Add the figures, and return the rows for the card and the figures' paths in the repository."""
    if results is None:
        return [], []
    found = read_results(results, (saved.entry.sae_id, saved.folder.resolve().name), only_sae)
    check_measured_on(found, saved.folder)
    paths: list[str] = []
    for figure in found.figures:
        name = saved.privacy.contents(figure.stem, "figures: ") or "figure"
        path = f"{saved.entry.sae_id}/figures/{re.sub(r'[^A-Za-z0-9_.-]+', '_', name)}.png"
        if path in plan.files:
            raise UserError(f"{figure} would be published as {path}, as another figure there; rename one of them.")
        plan.files[path] = read_png(figure)
        paths.append(path)
    rows = saved.privacy.contents(found.rows, f"{RESULTS_FILENAME}: ")
    if len({_key(row) for row in rows}) < len({_key(row) for row in found.rows}):
        raise UserError(f"Without the paths in them, two metrics in {results} are called the same; rename one of them.")
    return rows, paths


def _key(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(cell or "" for column, cell in row.items() if column != "value")


def _json(contents: dict[str, Any]) -> bytes:
    return json.dumps(contents, indent=2).encode()
