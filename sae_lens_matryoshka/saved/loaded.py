"""Any SAE that SAELens loads, whatever its architecture, from files that have been checked."""

from pathlib import Path
from typing import Any

from sae_lens import SAE, PretrainedSaeDiskLoader, PretrainedSaeHuggingfaceLoader
from sae_lens.loading.pretrained_sae_loaders import sae_lens_disk_loader
from torch import Tensor

from sae_lens_matryoshka.levels import recorded_widths
from sae_lens_matryoshka.saved.checks import check_saved_sae, loading_errors
from sae_lens_matryoshka.saved.hub_errors import hub_errors
from sae_lens_matryoshka.saved.known_releases import known_widths
from sae_lens_matryoshka.saved.published import published_sae_loader


def load_saved_sae(
    path: str | Path,
    device: str = "cpu",
    dtype: str | None = None,
    converter: PretrainedSaeDiskLoader = sae_lens_disk_loader,
    fold_W_dec_norm: bool = False,
) -> SAE[Any]:
    """As ``SAE.load_from_disk``, from files that have been checked; parameters have not been looked at yet.

    Raises:
        UserError: If the files are damaged or contradict each other.
    """
    with loading_errors(str(path)):
        if converter is sae_lens_disk_loader:
            check_saved_sae(Path(path), dtype)
        return SAE.load_from_disk(path, device, dtype, converter, fold_W_dec_norm)


def load_published_sae(
    release: str,
    sae_id: str,
    device: str = "cpu",
    dtype: str = "float32",
    force_download: bool = False,
    converter: PretrainedSaeHuggingfaceLoader | None = None,
    fold_W_dec_norm: bool = False,
) -> tuple[SAE[Any], dict[str, Any], Tensor | None]:
    """As ``SAE.from_pretrained_with_cfg_and_sparsity``, from files that have been checked.

    Widths that the files do not record but that are known (:mod:`saved.known_releases`) are in the SAE's metadata.

    Raises:
        UserError: If the Hub cannot be reached, or the files are damaged or contradict each other.
        ValueError: If there is no such release or id.
    """
    with hub_errors(release), loading_errors(f"{sae_id} of {release}"):
        sae, cfg_dict, log_sparsity = SAE.from_pretrained_with_cfg_and_sparsity(
            release, sae_id, device, dtype, force_download, converter or published_sae_loader(release), fold_W_dec_norm
        )
        if recorded_widths(sae.cfg.to_dict()) is None and (known := known_widths(release, sae_id)) is not None:
            sae.cfg.metadata.matryoshka_widths = known
    return sae, cfg_dict, log_sparsity
