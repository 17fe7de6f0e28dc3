"""Loading an SAE from wherever it lies: a folder, a checkpoint file, a repository or a SAELens release."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sae_lens import SAE
from sae_lens.constants import SAE_CFG_FILENAME

from sae_lens_matryoshka.errors import UserError
from sae_lens_matryoshka.levels import recorded_widths
from sae_lens_matryoshka.saes.matryoshka_sae import MatryoshkaSAE
from sae_lens_matryoshka.saved.checks import check_finite
from sae_lens_matryoshka.saved.dictionary_learning import WEIGHTS_FILENAME, dictionary_learning_disk_loader
from sae_lens_matryoshka.saved.loaded import load_published_sae, load_saved_sae
from sae_lens_matryoshka.saved.published import published_folder_loader, published_sae_loader


def load(
    source: str | Path,
    sae_id: str | None = None,
    *,
    widths: Sequence[int] | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    revision: str | None = None,
    force_download: bool = False,
) -> MatryoshkaSAE:
    """Load a Matryoshka SAE that this plugin, SAELens or dictionary_learning has saved.

    Args:
        source: A folder with ``cfg.json`` or ``ae.pt``, a folder of such folders, an ``ae.pt`` file, a repository
            ``user/name`` or a release of SAELens's directory. What is here is never looked for on the Hub, where the
            same name would be somebody else's.
        sae_id: The SAE's id: its folder in ``source``.
        widths: The level widths, for SAEs whose files do not record them.
        device: The device to load to.
        dtype: The data type to load as; None keeps the saved one of local files and, as SAELens does, takes float32
            for published SAEs.
        revision: Branch, tag or commit of a repository; None means the main branch.
        force_download: Whether to download again what is cached.

    Raises:
        UserError: If there is no such SAE, an option is for repositories only and the SAE is here, the Hub cannot be
            reached, or the files are damaged or contradictory.
        ValueError: If the widths are neither given, recorded nor known, contradict those, or do not fit the SAE.
    """
    sae = _load(source, sae_id, device, dtype, revision, force_download)
    return MatryoshkaSAE.from_sae(sae, widths)


def load_any(
    source: str | Path,
    sae_id: str | None = None,
    *,
    widths: Sequence[int] | None = None,
    device: str = "cpu",
    dtype: str | None = None,
) -> SAE[Any]:
    """As :func:`load`, but an SAE whose widths are neither given, recorded nor known comes without levels.

    Raises:
        UserError: If there is no such SAE, the Hub cannot be reached, or the files are damaged or contradictory.
        ValueError: If the widths do not fit the SAE.
        TypeError: If levels cannot be given to this kind of SAE.
    """
    sae = _load(source, sae_id, device, dtype)
    if widths is not None or recorded_widths(sae.cfg.to_dict()) is not None:
        return MatryoshkaSAE.from_sae(sae, widths)
    check_finite(sae.named_parameters())
    return sae


def _load(
    source: str | Path,
    sae_id: str | None,
    device: str,
    dtype: str | None,
    revision: str | None = None,
    force_download: bool = False,
) -> SAE[Any]:
    path = Path(source) / (sae_id or "")
    is_here = Path(source).exists()
    if is_here and (revision is not None or force_download):
        raise UserError(f"{source} is here, not on the Hub: leave out revision and force_download.")
    if is_here or sae_id is None:
        hint = "; for a Hub repository or release give its id too" if sae_id is None else ", nor is it asked of the Hub"
        return _load_from_disk(path, device, dtype, hint)
    loader = published_sae_loader(str(source))
    if revision is not None:
        if loader is None:
            raise UserError(
                f"revision={revision!r} is not possible for {source}, whose format SAELens reads by itself."
            )
        loader = partial(published_folder_loader, revision=revision)
    return load_published_sae(str(source), sae_id, device, dtype or "float32", force_download, loader)[0]


def _load_from_disk(path: Path, device: str, dtype: str | None, hint: str) -> SAE[Any]:
    if (path / SAE_CFG_FILENAME).is_file():
        return load_saved_sae(path, device, dtype)
    if path.is_file() or (path / WEIGHTS_FILENAME).is_file():
        return load_saved_sae(path, device, dtype, dictionary_learning_disk_loader)
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    ids = ", ".join(sorted(str(cfg.parent.relative_to(existing)) for cfg in existing.glob(f"*/{SAE_CFG_FILENAME}")))
    if ids and existing == path:
        raise UserError(f"{path} holds several SAEs; say which one by its id: {ids}.")
    if ids:
        raise UserError(f"There is no saved SAE at {path}; {existing} holds {ids}.")
    raise UserError(f"There is no saved SAE at {path} (no {SAE_CFG_FILENAME}){hint}.")
