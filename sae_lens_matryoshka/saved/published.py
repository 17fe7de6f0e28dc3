"""Downloading published SAEs: one consistent commit, compared with the hashes that the Hub declares.

SAELens downloads an SAE file by file, so that a push in between can mix two versions, and does not read the formats of
:mod:`dictionary_learning`. This loader takes the folder of an SAE in one piece and reads whichever format it finds.
"""

import glob
import hashlib
import re
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from sae_lens import PretrainedSaeHuggingfaceLoader
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME
from sae_lens.loading.pretrained_sae_loaders import (
    dictionary_learning_sae_huggingface_loader_1,
    get_conversion_loader_name,
    sae_lens_disk_loader,
)
from safetensors.torch import load_file
from torch import Tensor

from sae_lens_matryoshka.errors import UserError
from sae_lens_matryoshka.saved.checks import check_saved_sae
from sae_lens_matryoshka.saved.dictionary_learning import (
    CONFIG_FILENAME,
    WEIGHTS_FILENAME,
    NotMatryoshkaError,
    dictionary_learning_disk_loader,
)
from sae_lens_matryoshka.saved.hub_errors import hub_errors


def published_sae_loader(release: str) -> PretrainedSaeHuggingfaceLoader | None:
    """This plugin's loader for a release or repository, or None for formats that SAELens reads by itself."""
    ours = get_conversion_loader_name(release) in ("sae_lens", "dictionary_learning_1")
    return published_folder_loader if ours else None


def published_folder_loader(
    repo_id: str,
    folder_name: str,
    device: str = "cpu",
    force_download: bool = False,
    cfg_overrides: dict[str, Any] | None = None,
    revision: str | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor], Tensor | None]:
    """Load an SAE that SAELens or dictionary_learning has saved; a SAELens loader, for ``from_pretrained(converter=)``.

    Args:
        repo_id: The repository, ``user/name``.
        folder_name: The SAE's folder in it.
        device: The device to load to.
        force_download: Whether to download again what is cached.
        cfg_overrides: Fields of the config to set, such as ``dtype``.
        revision: Branch, tag or commit; None means the main branch.

    Returns:
        Config, parameters, and log sparsity if it was published.

    Raises:
        UserError: If the Hub cannot be reached, there is no such SAE, or its files are damaged.
    """
    folder = _download(repo_id, folder_name, revision, force_download)
    if (folder / WEIGHTS_FILENAME).is_file() and not (folder / SAE_CFG_FILENAME).is_file():
        try:
            return *dictionary_learning_disk_loader(folder, device, cfg_overrides), None
        except NotMatryoshkaError:  # another class of dictionary_learning's, which SAELens tells by its config
            return dictionary_learning_sae_huggingface_loader_1(repo_id, folder_name, device, False, cfg_overrides)
    check_saved_sae(folder, (cfg_overrides or {}).get("dtype"))
    cfg, state_dict = sae_lens_disk_loader(folder, device, cfg_overrides)
    sparsity = folder / SPARSITY_FILENAME
    return cfg, state_dict, load_file(sparsity, device)["sparsity"] if sparsity.is_file() else None


def _download(repo_id: str, folder_name: str, revision: str | None, force_download: bool) -> Path:
    """Bring an SAE's folder into the local cache, all files of one commit, and return where it lies."""
    names = (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME, WEIGHTS_FILENAME, CONFIG_FILENAME)
    with hub_errors(repo_id):
        snapshot = snapshot_download(
            repo_id,
            revision=revision,
            force_download=force_download,
            allow_patterns=[f"{glob.escape(folder_name)}/{name}" for name in names],
        )
    folder = Path(snapshot) / folder_name
    if not any((folder / name).is_file() for name in (SAE_CFG_FILENAME, WEIGHTS_FILENAME)):
        raise UserError(f"{repo_id} holds no SAE {folder_name!r}{_published_ids(repo_id, revision)}.")
    for name in (SAE_WEIGHTS_FILENAME, WEIGHTS_FILENAME):
        _check_hash(folder / name)
    return folder


def _published_ids(repo_id: str, revision: str | None) -> str:
    """The ids that there are, for the sentence that says that one is missing."""
    with hub_errors(repo_id):
        files = HfApi().list_repo_files(repo_id, revision=revision)
    ids = [str(Path(file).parent) for file in files if Path(file).name in (SAE_CFG_FILENAME, WEIGHTS_FILENAME)]
    if not ids:
        return ""
    return f"; it holds {', '.join(ids[:5])}{f' and {len(ids) - 5} more' if len(ids) > 5 else ''}"


def _check_hash(path: Path) -> None:
    """Compare a cached large file with the SHA-256 that the Hub declares for it, which the cache uses as its name."""
    blob = path.resolve()
    if not re.fullmatch("[0-9a-f]{64}", blob.name):  # absent, or a cache without links
        return
    digest = hashlib.sha256()
    with blob.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != blob.name:
        raise UserError(
            f"{path} is not the file that the Hub declares (its SHA-256 differs); download it again with "
            f"force_download=True."
        )
