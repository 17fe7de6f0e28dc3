"""``inspect``: the levels of a saved or published SAE, their figures where they were measured, and where it is from."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from sae_lens_matryoshka.cli.arguments import parse_widths
from sae_lens_matryoshka.cli.loading import load_saelens
from sae_lens_matryoshka.errors import UserError
from sae_lens_matryoshka.untrusted.terminal import PlainConsole

if TYPE_CHECKING:
    from sae_lens_matryoshka.saved.summary import SAESummary


def add_to(commands: Any) -> None:
    """Add the command to the parser's."""
    parser = commands.add_parser("inspect", help="show the levels of a saved or published SAE")
    parser.add_argument("sae", metavar="PATH_OR_REPO", help="a folder, a Hub repository or a SAELens release")
    parser.add_argument("--id", help="the SAE's id in the repository or release, or its folder in a folder of SAEs")
    parser.add_argument("--widths", help="level widths, where they are not recorded, as 2048,6144,...")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print what there is to see.

    Raises:
        UserError: If there is no such SAE, it cannot be loaded, or its levels are not known.
    """
    widths = None if options.widths is None else parse_widths(options.widths)
    path = Path(options.sae) / (options.id or "")
    if not Path(options.sae).exists() and options.id is None:
        raise UserError(
            f"There is no saved SAE at {options.sae} (no cfg.json); for a Hub repository or release give its id too."
        )
    console = PlainConsole()
    try:
        summaries = _summaries(options, path, widths)
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be shown: {error}") from error
    for title, summary in summaries:
        _show(summary, title, console)


def _summaries(options: argparse.Namespace, path: Path, widths: Sequence[int] | None) -> "list[tuple[str, SAESummary]]":
    from sae_lens_matryoshka.saved.summary import find_saves, summarize, summarize_folder

    saves = find_saves(path) if path.is_dir() else []
    if saves:
        return [(str(folder), summarize_folder(folder, widths)) for folder in saves]
    load_saelens()
    from sae_lens_matryoshka import hub

    sae = hub.load(options.sae, options.id, widths=widths)
    cfg = {**sae.cfg.to_dict(), "architecture": sae.saved_architecture()}
    title = f"{options.sae} {options.id}" if options.id else options.sae
    return [(title, summarize(cfg, sae.state_dict().get("threshold")))]


def _show(summary: "SAESummary", title: str, console: PlainConsole) -> None:
    from sae_lens_matryoshka.saved.level_figures import FIGURE_HEADINGS, figure_cells

    fires = "fires" if summary.threshold is None else "fires above (min / median / max)"
    measured = FIGURE_HEADINGS if summary.figures else ()
    d_in = summary.cfg["d_in"]
    table = Table(
        "level", "width", "new latents", fires, "parameters", *measured, title=f"{title} ({summary.architecture})"
    )
    for level, width in enumerate(summary.widths):
        narrower = summary.widths[level - 1] if level else 0
        table.add_row(
            str(level), str(width), str(width - narrower), summary.firing_rule(level),
            f"{2 * width * (d_in + 1) + d_in:,}",
            *(figure_cells(summary.figures[level]) if summary.figures else ()),
        )  # fmt: skip
    console.print(table)
    for name, value in _facts(summary).items():
        if value is not None:
            console.print(f"{name}: {value}", soft_wrap=True)


def _facts(summary: "SAESummary") -> dict[str, Any]:
    metadata, figures = summary.metadata, summary.figures
    details = metadata.get("training_architecture_details") or {}
    samples = f"{figures[0].n_samples:,} fresh samples after training" if figures else None
    dead = metadata.get("num_dead_features")
    return {
        "measured on": samples and f"{samples}: dead never fired on them, dense on more than a tenth",
        "dead in training": dead if dead is None else f"{dead}, which had not fired for a while when it ended",
        "d_in": summary.cfg["d_in"],
        "dtype": summary.cfg["dtype"],
        "trained as": metadata.get("training_architecture"),
        "k": details.get("k"),
        "model": metadata.get("model_name"),
        "hook": metadata.get("hook_name"),
        "data set": metadata.get("dataset_path"),
        "context size": metadata.get("context_size"),
        "SAELens version": metadata.get("sae_lens_training_version"),
    }
