"""The model card of a repository of SAEs: what is known about each, in a section that can be replaced.

The section stands between two HTML comments, and so does the part of each SAE in it. Publishing again replaces the
parts of the SAEs that are published, and leaves the other parts and all text around the section as they are.
"""

import json
import re
from dataclasses import dataclass, field
from typing import Any

import yaml
from huggingface_hub import CardData, ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from sae_lens_matryoshka.errors import UserError
from sae_lens_matryoshka.hub.card_tables import levels_table, literally, markdown_table, results_table, settings_table
from sae_lens_matryoshka.saved.checks import config_as_saelens_6
from sae_lens_matryoshka.untrusted.bounded import load_yaml

BEGIN = "<!-- sae-lens-matryoshka:begin (this section is replaced when SAEs are pushed; write above or below it) -->"
END = "<!-- sae-lens-matryoshka:end -->"
TAGS = ["saelens", "sparse-autoencoder", "matryoshka"]


@dataclass(frozen=True)
class CardEntry:
    """What the card says about one SAE."""

    sae_id: str
    cfg: dict[str, Any]
    run_settings: dict[str, Any] = field(default_factory=dict)
    """The config of the run that trained it, if there is one."""
    widths: list[int] | None = None
    level_figures: list[dict[str, str]] = field(default_factory=list)
    """The rows of ``levels.csv``, if there is one."""
    level_ids: list[str] = field(default_factory=list)
    """The ids of levels that are published as SAEs of their own."""
    results: list[dict[str, str]] = field(default_factory=list)
    figures: list[str] = field(default_factory=list)
    """Paths of the figures in the repository."""
    base_model: str | None = None
    """The model's repository on the Hub, if it has one."""
    dataset: str | None = None
    """The data set's repository on the Hub, if it has one."""
    keeps_results: bool = False
    """Whether results that stand in the card stay there."""
    replaces_weights: bool = False
    """Whether other weights were published under the id before."""


def render_card(
    existing: str | None,
    repo_id: str,
    entries: list[CardEntry],
    revision: str | None = None,
    license: str | None = None,
) -> str:
    """The card of a repository after SAEs have been published in it.

    Args:
        existing: The card that the repository has, or None.
        repo_id: The repository.
        entries: The SAEs that are published.
        revision: The branch that they are published on, if it is not the main one.
        license: The Hub's identifier of the weights' licence; None says nothing that the card does not say already.

    Raises:
        UserError: If the existing card's front matter is not valid or names another licence, or the marks of its
            section are damaged.
    """
    if existing is None:
        data = ModelCardData(license=license)
        _merge_front_matter(data, entries)
        section = _render_section({}, repo_id, entries, revision)
        return f"---\n{data.to_yaml()}\n---\n\n# {repo_id.split('/')[-1]}\n\n{section}\n"
    try:
        front_matter = REGEX_YAML_BLOCK.search(existing)
        load_yaml(front_matter.group(2) if front_matter else "")  # bounded, which huggingface_hub's reading is not
        card = ModelCard(existing)
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"The front matter of the README.md of {repo_id} is not valid; mend it first: {reason}"
        ) from error
    line_break = "\r\n" if "\r\n" in existing else "\n"
    before, parts, after = _split(card.text.replace("\r\n", "\n"), repo_id)
    section = _render_section(parts, repo_id, entries, revision)
    text = f"{before}{section}{after}".replace("\n", line_break)
    had = card.data.to_dict()
    _set_license(card.data, repo_id, license)
    _merge_front_matter(card.data, entries)
    if card.data.to_dict() == had:  # then it stays as it was written, comments included
        return existing[: len(existing) - len(card.text)] + text
    card.text = text
    return card.content


def check_license(license: str) -> None:
    """Check that a licence has the form of the Hub's identifiers; which there are the Hub itself decides.

    Raises:
        UserError: If it has not.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise UserError(
            f"{license!r} is not the Hub's identifier of a licence; those are in lower case, such as mit, apache-2.0, "
            f"cc-by-4.0, gemma or other."
        )


def listed_figures(card: str | None) -> dict[str, list[str]]:
    """The paths of the figures that a card shows in the part of each SAE."""
    parts = re.findall(_PART, card or "", re.DOTALL)
    return {sae_id: re.findall(r"^!\[[^\]\n]*\]\(([^()\s]+)\)\r?$", part, re.MULTILINE) for sae_id, part in parts}


def _set_license(data: CardData, repo_id: str, license: str | None) -> None:
    if license is None:
        return
    if data.get("license") not in (None, license):
        raise UserError(
            f"The README.md of {repo_id} says 'license: {data.get('license')}', not {license!r}; change it there, or "
            f"leave the licence out."
        )
    data["license"] = license


def _merge_front_matter(data: CardData, entries: list[CardEntry]) -> None:
    """Add what is missing; what stands there is kept."""
    if not data.get("library_name"):
        data["library_name"] = "saelens"
    added = {
        "tags": TAGS,
        "base_model": [entry.base_model for entry in entries if entry.base_model],
        "datasets": [entry.dataset for entry in entries if entry.dataset],
    }
    for key, values in added.items():
        present = data.get(key)
        listed = list(present) if isinstance(present, list) else [present] if present else []
        new = [value for value in dict.fromkeys(values) if value not in listed]
        if new:
            merged = listed + new
            data[key] = merged if len(merged) > 1 or key == "tags" else merged[0]


def _split(text: str, repo_id: str) -> tuple[str, dict[str, str], str]:
    """The text before the section, the parts of the SAEs in it by id, and the text after it."""
    begins = list(re.finditer(r"<!-- sae-lens-matryoshka:begin.*?-->", text))
    ends = list(re.finditer(re.escape(END), text))
    if not begins and not ends:
        return f"{text.rstrip()}\n\n" if text.strip() else "\n", {}, "\n"
    if len(begins) != 1 or len(ends) != 1 or begins[0].end() > ends[0].start():
        raise UserError(
            f"The README.md of {repo_id} must hold the marks '<!-- sae-lens-matryoshka:begin -->' and '{END}' once "
            f"each and in this order, or not at all; mend it first."
        )
    section = text[begins[0].end() : ends[0].start()]
    parts = {sae_id: part.strip() for sae_id, part in re.findall(_PART, section, re.DOTALL)}
    return text[: begins[0].start()], parts, text[ends[0].end() :]


_PART = r"<!-- sae-lens-matryoshka:sae (\S+) -->(.*?)<!-- sae-lens-matryoshka:sae-end -->"


def _render_section(parts: dict[str, str], repo_id: str, entries: list[CardEntry], revision: str | None) -> str:
    parts = {**parts, **{e.sae_id: _render_entry(e, repo_id, revision, parts.get(e.sae_id, "")) for e in entries}}
    paragraphs = [BEGIN, _INTRODUCTION]
    for sae_id in sorted(parts, key=_natural):
        paragraphs.append(
            f"<!-- sae-lens-matryoshka:sae {sae_id} -->\n{parts[sae_id]}\n<!-- sae-lens-matryoshka:sae-end -->"
        )
    paragraphs += ["## Citation", _CITATION, END]
    return "\n\n".join(paragraphs)


def _render_entry(entry: CardEntry, repo_id: str, revision: str | None, previous: str) -> str:
    cfg = config_as_saelens_6(entry.cfg)
    kind = "Matryoshka SAE" if entry.widths else "SAE"
    paragraphs = [f"## {literally(entry.sae_id)}", f"{kind}, saved as SAELens's architecture `{cfg['architecture']}`."]
    if entry.widths:
        paragraphs += ["### Levels", levels_table(entry.widths, entry.level_figures)]
        if entry.level_figures:
            paragraphs.append(
                "L0: mean number of latents that fire a token. FVU: fraction of the activations' variance that the "
                "level leaves unexplained; channels alike: with every channel divided by its standard deviation. Dead, "
                "dense, above half: latents that fired on none, more than a tenth, more than half of the tokens."
            )
    paragraphs += ["### Training", settings_table(cfg, entry.run_settings)]
    kept = re.search(r"^### Benchmarks\n.*?(?=^### Load\n)", previous, re.DOTALL | re.MULTILINE)
    if entry.keeps_results and kept:
        paragraphs.append(kept.group().strip())
        if entry.replaces_weights and _MEASURED_BEFORE not in kept.group():
            paragraphs.append(_MEASURED_BEFORE)
    elif entry.results or entry.figures:
        paragraphs += ["### Benchmarks", *([results_table(entry.results)] if entry.results else [])]
        paragraphs += [f"![{path.rsplit('/', 1)[-1]}]({path})" for path in entry.figures]
    paragraphs += ["### Load", _loading_code(entry, repo_id, revision)]
    return "\n\n".join(paragraphs)


def _loading_code(entry: CardEntry, repo_id: str, revision: str | None) -> str:
    name, sae_id = f'"{repo_id}"', f'"{entry.sae_id}"'
    if revision is None:
        plain = f"from sae_lens import SAE\n\nsae = SAE.from_pretrained({name}, {sae_id})"
        ours = f"from sae_lens_matryoshka import MatryoshkaSAE\n\nsae = MatryoshkaSAE.from_pretrained({name}, {sae_id})"
    else:
        plain = (
            f"from huggingface_hub import snapshot_download\nfrom sae_lens import SAE\n\n"
            f'folder = snapshot_download({name}, revision={json.dumps(revision)}, allow_patterns="{entry.sae_id}/*")\n'
            f'sae = SAE.load_from_disk(f"{{folder}}/{entry.sae_id}")'
        )
        ours = (
            f"from sae_lens_matryoshka import hub\n\nsae = hub.load({name}, {sae_id}, revision={json.dumps(revision)})"
        )
    blocks = [f"With SAELens alone{', all latents' if entry.widths else ''}:\n\n```python\n{plain}\n```"]
    if entry.widths:
        ours += (
            f"\nprint(sae.widths)  # {entry.widths}\nacts = sae.encode(x, level=0)  # x: (..., {entry.cfg['d_in']})\n"
            f"small = sae.at_level(0)  # an SAE of its own"
        )
        blocks.append(f"With its levels (`pip install sae-lens-matryoshka`):\n\n```python\n{ours}\n```")
    if entry.level_ids:
        rows = [(str(level), level_id) for level, level_id in enumerate(entry.level_ids)]
        blocks.append(f"Levels published as SAEs of their own:\n\n{markdown_table(['level', 'id'], rows)}")
    return "\n\n".join(blocks)


def _natural(sae_id: str) -> list[tuple[int, str]]:
    """Sort key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]{1,9})", sae_id)]


_MEASURED_BEFORE = "These results are those of weights that were published here before."

_INTRODUCTION = """Sparse autoencoders for [SAELens](https://github.com/decoderesearch/SAELens), published with
`sae-lens-matryoshka`. A [Matryoshka SAE](https://arxiv.org/abs/2503.17547) has nested levels: the first latents, up to
the width of a level, reconstruct the activations on their own."""

_CITATION = """```bibtex
@inproceedings{bussmann2025matryoshka,
  title = {Learning Multi-Level Features with Matryoshka Sparse Autoencoders},
  author = {Bussmann, Bart and Nabeshima, Noa and Karvonen, Adam and Nanda, Neel},
  booktitle = {International Conference on Machine Learning},
  year = {2025},
  url = {https://arxiv.org/abs/2503.17547}
}
```"""
