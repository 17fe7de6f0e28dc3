"""Which rows of a table of results are shown with an SAE."""

from pathlib import Path

import pytest

from sae_lens_matryoshka.errors import UserError
from sae_lens_matryoshka.hub.results import read_results


def _table(folder: Path, *saes: str) -> Path:
    rows = [f"{sae},loss,0.{number}" for number, sae in enumerate(saes)]
    (folder / "results.csv").write_text("\n".join(["sae,metric,value", *rows, ""]))
    return folder


def test_baselines_are_not_another_sae(tmp_path: Path):
    folder = _table(tmp_path, "ours", "ours_random", "model channels", "model channels of blocks.1.hook_resid_post")
    assert [row["value"] for row in read_results(folder, ["other"], only_sae=True).rows] == ["0.0"]
    with pytest.raises(UserError, match="but none about other"):
        read_results(folder, ["other"], only_sae=False)
    with pytest.raises(UserError, match="but none about other"):
        read_results(_table(tmp_path, "a_random", "b"), ["other"], only_sae=True)  # an SAE that is called so
    assert len(read_results(_table(tmp_path, "ours", ""), ["other"], only_sae=True).rows) == 2
