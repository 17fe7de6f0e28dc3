"""The model card: what it says, what it keeps of a person's, and that its own code runs."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from markdown_it import MarkdownIt

from sae_lens_matryoshka import hub
from sae_lens_matryoshka.cli.command_line import main
from sae_lens_matryoshka.errors import UserError
from sae_lens_matryoshka.hub.card_tables import levels_table, markdown_table, results_table
from sae_lens_matryoshka.hub.model_card import END, CardEntry, render_card
from tests.hub.conftest import png
from tests.hub.local_hub import LocalHub

ID = "blocks.2.hook_resid_post"
CFG = {"architecture": "jumprelu", "d_in": 6, "d_sae": 20, "dtype": "float32", "metadata": {"sae_lens_version": "6.54"}}


def _entry(sae_id: str = "layer_2", **fields: object) -> CardEntry:
    return CardEntry(sae_id, dict(CFG), **fields)  # type: ignore[arg-type]


def _front_matter(card: str) -> dict[str, object]:
    match = re.match(r"---\r?\n(.*?)\r?\n---\r?\n", card, re.DOTALL)
    assert match
    return yaml.safe_load(match.group(1))


def _published_card(local_hub: LocalHub, revision: str = "main") -> str:
    return local_hub.repositories["owner/saes"].files(revision)["README.md"].decode()


def test_a_new_card_says_what_is_known(local_hub: LocalHub, saved_sae: Path):
    hub.push_to_hub(saved_sae, "owner/saes")
    card = _published_card(local_hub)
    assert _front_matter(card) == {
        "library_name": "saelens",
        "tags": ["saelens", "sparse-autoencoder", "matryoshka"],
        "datasets": "roneneldan/TinyStories",
    }
    assert "\n# saes\n" in card
    assert "| 2 | 20 | 3.00 | 0.2500 | - | 5 (25.0%) | 0 (0.0%) | - |" in card
    for setting in ("| model | tiny-model |", "| k | 3 |", "| training_tokens | 400,000 |", "| lr | 0.0003 |"):
        assert setting in card
    assert "bussmann2025matryoshka" in card


@pytest.mark.parametrize("revision", [None, "v2"])
def test_the_loading_code_of_the_card_runs(local_hub: LocalHub, saved_sae: Path, revision: str | None):
    hub.push_to_hub(saved_sae, "owner/saes", revision=revision)
    blocks = re.findall(r"```python\n(.*?)```", _published_card(local_hub, revision or "main"), re.DOTALL)
    assert len(blocks) == 2
    for code in blocks:
        names = {"x": torch.randn(4, 6)}
        exec(code, names)
        assert names["sae"](names["x"]).shape == (4, 6)  # type: ignore[operator]
        if "small" in names:
            assert names["small"].cfg.d_sae == 3  # type: ignore[attr-defined]


@pytest.mark.parametrize("line_break", ["\n", "\r\n"])
def test_what_a_person_wrote_stays(local_hub: LocalHub, saved_sae: Path, line_break: str):
    mine = "---\nlicense: mit # checked with legal\ntags:\n- gemma\ndatasets: someone/text\n---\n\n# My SAEs\n\nMine.\n"
    local_hub.create("owner/saes", {"README.md": mine.replace("\n", line_break).encode()})
    hub.push_to_hub(saved_sae, "owner/saes")
    card = _published_card(local_hub)
    assert card.count("\r\n") == (card.count("\n") if line_break == "\r\n" else 0)
    assert f"{line_break}# My SAEs{line_break}{line_break}Mine.{line_break}" in card
    assert _front_matter(card) == {
        "license": "mit",
        "library_name": "saelens",
        "tags": ["gemma", "saelens", "sparse-autoencoder", "matryoshka"],
        "datasets": ["someone/text", "roneneldan/TinyStories"],
    }

    # text above, inside and below the section, and a comment in the front matter
    edited = card.replace("Mine.", "Mine, edited.").replace("license: mit", "license: mit # checked with legal")
    edited = edited.replace("### Levels", "### Levels (edited)") + f"{line_break}Below.{line_break}"
    repository = local_hub.repositories["owner/saes"]
    repository.commit("main", {**repository.files(), "README.md": edited.encode()}, "edit")
    hub.push_to_hub(saved_sae, "owner/saes")
    again = _published_card(local_hub)
    assert again == edited.replace("### Levels (edited)", "### Levels")


def test_the_licence_is_what_its_owner_says(local_hub: LocalHub, saved_sae: Path):
    hub.push_to_hub(saved_sae, "owner/saes", license="apache-2.0")
    assert _front_matter(_published_card(local_hub))["license"] == "apache-2.0"
    assert main(["push", str(saved_sae), "owner/saes", "--license", "apache-2.0"]) == 0
    hub.push_to_hub(saved_sae, "owner/saes")
    assert _front_matter(_published_card(local_hub))["license"] == "apache-2.0"
    writes = local_hub.writes()
    with pytest.raises(UserError, match=r"README.md of owner/saes says 'license: apache-2.0', not 'mit'"):
        hub.push_to_hub(saved_sae, "owner/saes", license="mit")
    with pytest.raises(UserError, match=r"'Apache 2.0' is not the Hub's identifier of a licence"):
        hub.push_to_hub(saved_sae, "owner/saes", license="Apache 2.0")
    assert local_hub.writes() == writes

    card = render_card("---\nlibrary_name: saelens\n---\n\nMine.\n", "owner/saes", [_entry()], license="mit")
    assert _front_matter(card)["license"] == "mit"


def test_an_sae_pushed_later_joins_the_others_in_natural_order():
    card = render_card(None, "owner/saes", [_entry("layer_10")])
    card = render_card(card, "owner/saes", [_entry("layer_2", widths=[3, 20])])
    assert re.findall(r"^## (\S+)$", card, re.MULTILINE) == ["layer_2", "layer_10", "Citation"]
    replaced = render_card(card, "owner/saes", [_entry("layer_2", widths=[5, 20])])
    assert "| 0 | 5 |" in replaced
    assert "| 0 | 3 |" not in replaced
    assert re.findall(r"^## (\S+)$", replaced, re.MULTILINE) == ["layer_2", "layer_10", "Citation"]
    assert render_card(replaced, "owner/saes", [_entry("layer_2", widths=[5, 20])]) == replaced


def test_a_card_without_front_matter_gets_one():
    card = render_card("Just text.\n", "owner/saes", [_entry()])
    assert _front_matter(card)["library_name"] == "saelens"
    assert card.index("Just text.") < card.index(END)


def test_results_and_figures_are_shown_and_uploaded(local_hub: LocalHub, saved_sae: Path, tmp_path: Path):
    results = tmp_path / "results"
    results.mkdir()
    (results / "results.csv").write_text(
        "sae,level,width,evaluation,metric,value,seed\n"
        f"{ID},0,3,core,ce_loss_score,0.91234567,1\n"
        f"{ID},1,8,core,ce_loss_score,0.95,1\n"
        f"{ID},1,8,absorption,mean | full,0.1,1\n"
        "another,0,3,core,ce_loss_score,0.5,1\n"
    )
    (results / "sparse probing.png").write_bytes(png())
    hub.push_to_hub(saved_sae, "owner/saes", results=results)
    card = _published_card(local_hub)
    assert "| evaluation | metric | level 0 (3) | level 1 (8) |" in card
    assert "| core | ce_loss_score | 0.9123 | 0.95 |" in card
    assert "| absorption | `mean \\| full` |  | 0.1 |" in card
    assert "0.5 |" not in card
    figure = f"{ID}/figures/sparse_probing.png"
    assert f"![sparse_probing.png]({figure})" in card
    assert local_hub.repositories["owner/saes"].files()[figure].startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (None, "There are no results in"),
        ("", "no column metric and no column value"),
        ("sae,metric\nx,1\n", "no column value"),
        ("sae,metric,value\none,m,1\ntwo,m,2\n", "has results about one, two, but none about"),
    ],
)
def test_unusable_results_are_one_sentence(saved_sae: Path, tmp_path: Path, table: str | None, message: str):
    results = tmp_path / "results"
    results.mkdir()
    if table is not None:
        (results / "results.csv").write_text(table)
    with pytest.raises(UserError, match=message):
        hub.push_to_hub(saved_sae, "owner/saes", results=results, dry_run=True)


def test_results_with_few_or_odd_columns():
    assert results_table([{"metric": "m", "value": "0.5"}]).endswith("|  | m | 0.5 |")
    mixed = [
        {"metric": "m", "value": "n/a", "level": "1.0", "width": "8.0"},
        {"metric": "m", "value": "1", "level": "", "width": ""},
    ]
    assert results_table(mixed).splitlines()[0] == "| evaluation | metric | value | level 1 (8) |"
    assert results_table(mixed).splitlines()[2] == "|  | m | 1 | n/a |"
    assert "<summary>50 metrics</summary>" in results_table([{"metric": str(i), "value": "1"} for i in range(50)])


def test_figures_that_older_tables_lack_are_a_dash():
    row = {"l0": "1.1", "fvu": "0.7", "dead": "0", "dense": "1"}
    younger = {**row, "fvu_standardized": "0.5", "above_half": "2"}
    assert levels_table([4, 8], [row, younger]).splitlines()[2:] == [
        "| 0 | 4 | 1.10 | 0.7000 | - | 0 (0.0%) | 1 (25.0%) | - |",
        "| 1 | 8 | 1.10 | 0.7000 | 0.5000 | 0 (0.0%) | 1 (12.5%) | 2 (25.0%) |",
    ]


def test_cells_cannot_break_a_table():
    assert markdown_table(["a"], [["x | y\nz <!-- "]]).splitlines()[2] == "| `x \\| y z <! --` |"
    assert levels_table([3, 20], []).splitlines()[2:] == ["| 0 | 3 |", "| 1 | 20 |"]


HOSTILE = (
    "![x](https://evil.example/pixel.png)", "[click](https://evil.example)", "<img src=https://evil.example>",
    "https://evil.example", "www.evil.example", "a | ![x](https://evil.example)", "a \\| ![x](https://evil.example)",
    "a \\\\| ![x](https://evil.example)", "`` ![x](https://evil.example) `", "<script>alert(1)</script>", "\n\n# Title",
    END, "<!-- sae-lens-matryoshka:sae x -->", "<https://evil.example>", "[x]: https://evil.example",
    "\x1b[2J\u202e", "x` <b>y</b>",
)  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_what_configs_and_results_say_is_text_in_a_card(text: str):
    """Read by a Markdown parser with tables and HTML, as the Hub's is: no link, picture or HTML but our own."""
    metadata = {"model_name": text, "hook_name": text, "training_architecture_details": {"k": text, text: "x"}}
    cfg = {**CFG, "dtype": text, "metadata": {**CFG["metadata"], **metadata}}
    rows = [{"evaluation": text, "metric": text, "value": text, "level": text, "width": text}]
    entry = CardEntry("layer_2", cfg, {"lr_scheduler_name": text}, [3, 20], results=rows)
    card = render_card(None, "owner/saes", [entry])
    plain = render_card(None, "owner/saes", [_entry(widths=[3, 20])])
    assert render_card(card, "owner/saes", [entry]) == card  # its marks are whole
    assert all(character.isprintable() or character == "\n" for character in card)

    def kinds(markdown: str, *wanted: str) -> list[tuple[str, str]]:
        parser = MarkdownIt("commonmark", {"html": True}).enable("table")
        body = markdown.partition("\n---\n")[2]
        tokens = [inner for token in parser.parse(body) for inner in (token, *(token.children or []))]
        return [(token.type, str(token.attrs) + token.content) for token in tokens if token.type in wanted]

    active = ("link_open", "image", "html_inline", "html_block", "heading_open")
    benchmarks = ("heading_open", "{}")  # the one heading that results add
    assert sorted(kinds(card, *active)) == sorted([*kinds(plain, *active), benchmarks])
    # what a renderer that makes links of bare addresses would do so with
    texts = [content for _, content in kinds(card, "text")]
    assert not any("evil.example" in content for content in texts)


def test_a_card_that_unfolds_is_refused():
    bomb = "x0: &x0 [x, x, x, x, x, x, x, x, x, x]\n"
    for index in range(9):
        bomb += f"x{index + 1}: &x{index + 1} [{', '.join([f'*x{index}'] * 10)}]\n"
    with pytest.raises(UserError, match=r"front matter of the README.md of owner/saes is not valid.*unfolds"):
        render_card(f"---\n{bomb}---\n\nMine.\n", "owner/saes", [_entry()])


def test_an_odd_id_in_a_card_does_no_harm():
    card = render_card(None, "owner/saes", [_entry("layer_10")])
    for odd in ("²", "9" * 6000):
        other = card.replace("sae layer_10 -->", f"sae {odd} -->")
        assert f"sae {odd} -->" in render_card(other, "owner/saes", [_entry("layer_2")])
