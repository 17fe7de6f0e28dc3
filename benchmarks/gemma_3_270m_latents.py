"""What the latents of each level fire on: the tables and texts of docs/gemma-3-270m-latents.md.

    python benchmarks/gemma_3_270m_latents.py --sae FOLDER --cache DIR --tokenizer MODEL

Ten latents of each level are drawn (seed 0) from those of its own that fired on at least 20 tokens, so that nobody has
chosen them. Of each it shows where it fires most and where it fires at random.
"""

import argparse
import html
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sae_lens_matryoshka import MatryoshkaSAE
from sae_lens_matryoshka.activation_cache.cache import ActivationCache

PAGE = Path(__file__).parents[1] / "docs" / "gemma-3-270m-latents.md"
BLOCK = 8192
FEWEST_FIRINGS = 20
LATENTS_A_LEVEL, TOP, RANDOM = 10, 4, 4
BEFORE, AFTER = 10, 4


def main() -> None:
    """Read the cache once, then write the page's part between its markers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sae", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of the model")
    parser.add_argument("--activations", type=int, default=200_000, help="how many to look at, from the cache's start")
    options = parser.parse_args()
    sae = MatryoshkaSAE.load_from_disk(options.sae)
    cache = ActivationCache(options.cache)
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    n_rows = min(options.activations, cache.n_rows)
    rows, latents, values = firings(sae, cache, n_rows)
    parts = [_generality(sae, latents, cache.tokens()[rows], n_rows)]
    for level, width in enumerate(sae.widths):
        parts.append(f"### Level {level}, latents up to {width:,}")
        for latent in _drawn(sae, level, latents):
            parts.append(_latent(latent, rows, latents, values, n_rows, cache, tokenizer))
    begin, end = "<!-- latents: begin -->", "<!-- latents: end -->"
    before, rest = PAGE.read_text(encoding="utf-8").split(begin)
    PAGE.write_text(f"{before}{begin}\n\n" + "\n\n".join(parts) + f"\n\n{end}{rest.split(end)[1]}", encoding="utf-8")


@torch.no_grad()
def firings(sae: MatryoshkaSAE, cache: ActivationCache, n_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row, latent and activation of everything that fires on the first rows of the cache."""
    [hook] = cache.manifest.d_in
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for rows in tqdm(torch.arange(n_rows).split(BLOCK), desc="encoding"):
        acts = sae.encode(cache.begin_reading([hook], rows)()[hook].float())
        samples, latents = acts.nonzero(as_tuple=True)
        found.append((rows[samples].int(), latents.int(), acts[samples, latents].half()))
    rows, latents, values = (torch.cat(parts) for parts in zip(*found, strict=True))
    return rows.long(), latents.long(), values.float()


def _generality(sae: MatryoshkaSAE, latents: Tensor, tokens: Tensor, n_rows: int) -> str:
    """How often latents of each level fire, and on how many different tokens."""
    counts = torch.bincount(latents, minlength=sae.widths[-1])
    pairs, of_pair = (latents * 2**20 + tokens).unique(return_counts=True)
    of_latent = pairs // 2**20
    largest = torch.zeros(sae.widths[-1], dtype=torch.long).scatter_reduce_(0, of_latent, of_pair, "amax")
    share = largest / counts.clamp(min=1)
    header = ["level", "of its own that fire", "share of tokens, median", "on one token mostly", "top token's share"]
    lines = [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header))]
    for level, (start, end) in enumerate(zip([0, *sae.widths], sae.widths, strict=False)):
        alive = torch.arange(start, end)[counts[start:end] >= FEWEST_FIRINGS]
        mostly = (share[alive] > 0.5).float().mean()
        lines.append(
            f"| {level} | {len(alive):,} of {end - start:,} | {counts[alive].float().median() / n_rows:.4%} | "
            f"{mostly:.0%} | {share[alive].median():.0%} |"
        )
    return "\n".join(lines)


def _drawn(sae: MatryoshkaSAE, level: int, latents: Tensor) -> list[int]:
    start = 0 if level == 0 else sae.widths[level - 1]
    counts = torch.bincount(latents, minlength=sae.widths[-1])[start : sae.widths[level]]
    alive = (counts >= FEWEST_FIRINGS).nonzero().squeeze(1) + start
    order = torch.randperm(len(alive), generator=torch.Generator().manual_seed(0))
    return sorted(alive[order[:LATENTS_A_LEVEL]].tolist())


def _latent(
    latent: int,
    rows: Tensor,
    latents: Tensor,
    values: Tensor,
    n_rows: int,
    cache: ActivationCache,
    tokenizer: PreTrainedTokenizerBase,
) -> str:
    own = (latents == latent).nonzero().squeeze(1)
    by_value = own[values[own].argsort(descending=True)]
    at_random = own[torch.randperm(len(own), generator=torch.Generator().manual_seed(0))[:RANDOM]]
    lines = [f"**{latent}**, on {len(own) / n_rows:.3%} of tokens:", ""]
    top = list(_apart(by_value, rows))
    for name, entries in (("most", top), ("at random", at_random.tolist())):
        texts = " · ".join(_shown(int(rows[entry]), cache, tokenizer) for entry in entries)
        lines.append(f"- *{name}* ({values[entries].mean():.0f}): {texts}")
    return "\n".join(lines)


def _apart(by_value: Tensor, rows: Tensor) -> Iterator[int]:
    """The first entries that lie at least a context apart: one text shown twice says nothing new."""
    seen: list[int] = []
    for entry in by_value.tolist():
        row = int(rows[entry])
        if all(abs(row - other) >= 128 for other in seen):
            seen.append(row)
            yield entry
        if len(seen) == TOP:
            return


def _shown(row: int, cache: ActivationCache, tokenizer: PreTrainedTokenizerBase) -> str:
    tokens, place = cache.text_of(row)
    before, after = tokens[max(0, place - BEFORE) : place], tokens[place + 1 : place + 1 + AFTER]
    parts = [_escaped(str(tokenizer.decode(part))) for part in (before, tokens[place : place + 1], after)]
    return f"{parts[0]}<b>{parts[1].strip() or '␣'}</b>{parts[2]}"


def _escaped(text: str) -> str:
    text = html.escape(text.replace("\n", "⏎"))
    return "".join(f"&#{ord(character)};" if character in "*_`[]|~\\" else character for character in text)


if __name__ == "__main__":
    main()
