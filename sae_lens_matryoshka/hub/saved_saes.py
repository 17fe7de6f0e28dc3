"""What lies in a folder to be published: its SAEs, checked, with ids, configs free of local paths, and level figures.

The data's way: folder -> folders with ``cfg.json`` (:func:`find_saved_saes`) -> each loaded once in full, so that what
cannot be loaded is not published -> :class:`SavedSAE`, from which the upload and the model card are made.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME
from sae_lens.synthetic import RUNNER_CONFIG_FILENAME

from sae_lens_matryoshka.errors import UserError
from sae_lens_matryoshka.hub.model_card import CardEntry
from sae_lens_matryoshka.hub.own_files import MAX_BYTES, check_own_file
from sae_lens_matryoshka.hub.privacy import PrivacyFilter
from sae_lens_matryoshka.levels import recorded_widths
from sae_lens_matryoshka.saes.matryoshka_sae import MatryoshkaSAE
from sae_lens_matryoshka.saved.checks import check_finite, check_saved_sae, config_as_saelens_6, read_json
from sae_lens_matryoshka.saved.level_figures import LEVELS_FILENAME, are_of_saved_sae
from sae_lens_matryoshka.saved.loaded import load_saved_sae
from sae_lens_matryoshka.text.data_files import shown
from sae_lens_matryoshka.untrusted.bounded import is_number, is_whole_number
from sae_lens_matryoshka.untrusted.csv_tables import read_csv

SAE_FILENAMES = (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME, RUNNER_CFG_FILENAME)
"""The files of an SAE in a repository."""


@dataclass(frozen=True)
class SavedSAE:
    """An SAE on disk that can be published."""

    folder: Path
    """Its folder on disk."""

    entry: CardEntry
    """What its files say for the model card, free of local paths."""

    runner_cfg: dict[str, Any] | None
    """The config of the run that trained it, free of local paths; None if there is none."""

    privacy: PrivacyFilter
    """What everything that is published of it passes through."""


def find_saved_saes(path: str | Path, sae_id: str | None = None, hub_names: Collection[str] = ()) -> list[SavedSAE]:
    """The SAEs in a folder that SAELens or this plugin has saved, or in the folders below it.

    Args:
        path: A folder with ``cfg.json``, or a folder of such folders.
        sae_id: The id of a single SAE. Without it that is the name of its hook, or of its folder where it has none;
            the SAEs of a folder of folders are called by their paths in it.
        hub_names: Names of models and data sets that are on the Hub, though the SAEs do not record it.

    Raises:
        UserError: If there is none, an id is not possible, a file is a link to another folder, an SAE cannot be loaded
            in full, or none of them has a name of ``hub_names``.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"There is no folder {path}.")
    if (path / SAE_CFG_FILENAME).is_file():
        saes = [_read(path, path, sae_id, hub_names)]
    else:
        folders = sorted(cfg.parent for cfg in path.rglob(SAE_CFG_FILENAME))
        if not folders:
            raise UserError(f"{path} is not a saved SAE (no {SAE_CFG_FILENAME}), nor does it hold any.")
        if sae_id is not None:
            raise UserError(
                f"{path} holds {len(folders)} SAEs, which are called by their folders; push one of those folders to "
                f"give it the id {sae_id!r}."
            )
        saes = [_read(folder, path, folder.relative_to(path).as_posix(), hub_names) for folder in folders]
    for name in hub_names:
        if not any(name in saved.privacy.seen for saved in saes):
            raise UserError(f"No config to be published names {name!r}, which is said to be on the Hub.")
    return saes


def check_sae_id(sae_id: str) -> str:
    """Refuse an id that cannot be the folder of an SAE in a repository.

    Raises:
        UserError: If it is empty, absolute, leaves the repository, or has characters that a URL would change.
    """
    parts = sae_id.split("/")
    allowed = all(re.fullmatch(r"[\w.-]+", part, re.ASCII) and part.strip(".") for part in parts)
    if not allowed or any(part in (".git", ".cache") for part in parts):
        raise UserError(
            f"The id {sae_id!r} is not possible: it must be a relative path of letters, digits, '.', '_' and '-', as "
            f"blocks.12.hook_resid_post or layer_12/width_16k."
        )
    return sae_id


def _read(folder: Path, root: Path, sae_id: str | None, hub_names: Collection[str]) -> SavedSAE:
    """Read and check one SAE; ``root`` is the folder that the user named, which may hold the run's config."""
    if sae_id is not None:
        check_sae_id(sae_id)
    runner_cfg_path = next(
        (file for file in (folder / RUNNER_CFG_FILENAME, root / RUNNER_CFG_FILENAME) if file.is_file()), None
    )
    synthetic_cfg_path = folder / RUNNER_CONFIG_FILENAME
    own_files = [folder / name for name in (*SAE_FILENAMES, LEVELS_FILENAME, RUNNER_CONFIG_FILENAME)]
    for path in (runner_cfg_path, *own_files):
        if path is not None and (path.exists() or path.is_symlink()):
            check_own_file(path, root, None if path.suffix == ".safetensors" else MAX_BYTES)
    saved_cfg = check_saved_sae(folder)
    metadata = config_as_saelens_6(saved_cfg).get("metadata") or {}
    privacy = PrivacyFilter(metadata, hub_names)
    cfg = privacy.contents(saved_cfg, f"{SAE_CFG_FILENAME}: ")
    if sae_id is None:
        sae_id = check_sae_id(metadata.get("hook_name") or folder.resolve().name)
    runner_cfg = None
    if runner_cfg_path is not None:
        runner_cfg = privacy.contents(read_json(runner_cfg_path), f"{RUNNER_CFG_FILENAME}: ")
    run_settings = runner_cfg or {}  # for the card, which also reads the config of a run on synthetic data
    if runner_cfg is None and synthetic_cfg_path.is_file():
        # only numbers of it are shown, so what is replaced in it is none of what is published
        run_settings = PrivacyFilter(metadata, hub_names).contents(read_json(synthetic_cfg_path), "")
    entry = CardEntry(
        sae_id,
        cfg,
        run_settings,
        recorded_widths(saved_cfg),
        _read_levels(folder / LEVELS_FILENAME),
        base_model=privacy.hub_model(metadata.get("model_name")),
        dataset=privacy.hub_dataset(metadata.get("dataset_path")),
    )
    _check_loads(folder, entry)
    return SavedSAE(folder, entry, runner_cfg, privacy)


def _check_loads(folder: Path, entry: CardEntry) -> None:
    """Load an SAE and let it go again, so that nothing is published that others cannot load."""
    sae = load_saved_sae(folder)
    check_finite(sae.named_parameters())
    if entry.widths is None:
        return
    try:
        widths = MatryoshkaSAE.from_sae(sae).widths
    except (ValueError, TypeError) as error:
        raise UserError(f"The levels of {folder} cannot be read: {error}") from error
    measured = [int(row["width"]) for row in entry.level_figures]
    if measured and measured != widths:
        raise UserError(
            f"{folder / LEVELS_FILENAME} has figures for levels {measured}, but the SAE's are {widths}; "
            f"remove the file."
        )
    if measured and not are_of_saved_sae(entry.level_figures, folder):
        raise UserError(
            f"{folder / LEVELS_FILENAME} has figures that were measured on other weights than those beside it, "
            f"or does not say on which; measure again with train --resume auto, or remove the file."
        )


def _read_levels(path: Path) -> list[dict[str, str]]:
    """The rows of ``levels.csv``, all of them numbers, since they go into the card as they stand."""
    if not path.is_file():
        return []
    rows = read_csv(path, ["width"])
    for row in rows:
        for column, fits in _LEVEL_COLUMNS.items():
            cell = row.get(column, "")
            if not fits(cell) and (cell or column == "width"):
                raise UserError(f"{path} is not a table of levels: {column}={shown(cell)} is no number; remove it.")
    return rows


_LEVEL_COLUMNS = {
    **dict.fromkeys(("width", "dead", "dense", "above_half"), is_whole_number),
    **dict.fromkeys(("l0", "fvu", "fvu_standardized"), is_number),
}
