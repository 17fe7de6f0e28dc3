"""Widths of published Matryoshka SAEs whose own files do not record them.

Only what has a source stands here. SAEBench's Matryoshka SAEs need no entry, since their checkpoints hold the group
sizes. Gemma Scope 2 has none, since no source for its prefixes was found: its SAEs take ``widths=``.
"""

from dataclasses import dataclass

from sae_lens.loading.pretrained_saes_directory import get_repo_id_and_folder_name


@dataclass(frozen=True)
class KnownRelease:
    """The widths of all SAEs of a repository."""

    widths: tuple[int, ...]
    """The number of latents of each level, smallest level first."""

    source: str
    """Where they are documented."""


_CHANIND_WIDTHS = (128, 512, 2048, 8192, 32768)

KNOWN_RELEASES: dict[str, KnownRelease] = {
    repo_id: KnownRelease(_CHANIND_WIDTHS, f"https://huggingface.co/{repo_id}: 'trained with Matryoshka layers of'")
    for repo_id in (
        "chanind/gemma-2-2b-batch-topk-matryoshka-saes-w-32k-l0-40",
        "chanind/gemma-2-9b-batch-topk-matryoshka-saes-w-32k-l0-60",
        "chanind/gemma-3-1b-batch-topk-matryoshka-saes-w-32k-l0-40",
    )
}
"""Releases by repository."""


def known_widths(release: str, sae_id: str) -> list[int] | None:
    """The widths of an SAE of a release of SAELens's directory or a repository, or None if they are not known.

    Raises:
        ValueError: If the release has no such id.
    """
    repo_id, _ = get_repo_id_and_folder_name(release, sae_id)
    known = KNOWN_RELEASES.get(repo_id)
    return None if known is None else list(known.widths)
