"""The table of published SAEs without recorded widths agrees with SAELens's directory."""

import pytest
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

from sae_lens_matryoshka.levels import validate_widths
from sae_lens_matryoshka.saved.known_releases import KNOWN_RELEASES, known_widths


def test_every_known_repository_is_in_saelens_directory_and_has_a_source():
    repositories = {release.repo_id for release in get_pretrained_saes_directory().values()}
    for repo_id, known in KNOWN_RELEASES.items():
        assert repo_id in repositories
        assert known.source.startswith("https://")
        assert validate_widths(known.widths, known.widths[-1]) == list(known.widths)


@pytest.mark.parametrize(
    ("release", "sae_id"),
    [
        ("gemma-2-2b-res-matryoshka-dc", "blocks.0.hook_resid_post"),
        ("gemma-2-2b-res-snap-matryoshka-dc", "blocks.3.hook_resid_post"),
        ("gemma-2-9b-res-matryoshka-dc", "blocks.0.hook_resid_post"),
        ("gemma-3-1b-res-matryoshka-dc", "blocks.1.hook_resid_post"),
        ("chanind/gemma-3-1b-batch-topk-matryoshka-saes-w-32k-l0-40", "anything"),
    ],
)
def test_widths_are_known_by_release_and_by_repository(release: str, sae_id: str):
    assert known_widths(release, sae_id) == [128, 512, 2048, 8192, 32768]


def test_others_are_not_guessed():
    assert known_widths("gpt2-small-res-jb", "blocks.0.hook_resid_pre") is None
    assert known_widths("gemma-scope-2-270m-pt-res", "layer_12_width_16k_l0_big") is None
    assert known_widths("someone/saes", "x") is None
