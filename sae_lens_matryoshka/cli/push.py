"""``push``: saved SAEs to the Hugging Face Hub, with everything that is published shown before."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_lens_matryoshka.cli.loading import load_saelens
from sae_lens_matryoshka.errors import UserError
from sae_lens_matryoshka.untrusted.terminal import PlainConsole

if TYPE_CHECKING:
    from sae_lens_matryoshka.hub import Push


def add_to(commands: Any) -> None:
    """Add the command to the parser's."""
    parser = commands.add_parser("push", help="publish saved SAEs on the Hugging Face Hub in one commit")
    parser.add_argument("path", metavar="PATH", help="a saved SAE, or a folder of them")
    parser.add_argument("repo_id", metavar="REPO_ID", help="the repository, as user/name; made if it does not exist")
    parser.add_argument("--id", help="id of a single SAE (default: its hook's name; folders keep their names)")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to publish on (default: the main one)")
    parser.add_argument("--results", metavar="DIR", help="benchmark results to show: results.csv and PNG figures")
    parser.add_argument("--levels", action="store_true", help="also publish each level as an SAE of its own")
    parser.add_argument(
        "--hub-name", action="append", default=[], metavar="NAME",
        help="a model or data set in the configs that is on the Hub, where the SAE does not record it; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--license", metavar="ID",
        help="your licence for the SAEs, by the Hub's identifier, as mit or cc-by-4.0 (default: what the card says)",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print the model card and the files, write nothing")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Publish, or show what would be published.

    Raises:
        UserError: If something cannot be published.
    """
    for path in filter(None, (options.path, options.results)):
        if not Path(path).exists():
            raise UserError(f"There is nothing at {path}.")
    load_saelens()
    from sae_lens_matryoshka import hub

    console = PlainConsole(soft_wrap=True)
    push = hub.push_to_hub(
        options.path,
        options.repo_id,
        options.id,
        private=options.private,
        revision=options.revision,
        results=options.results,
        levels=options.levels,
        hub_names=options.hub_name,
        license=options.license,
        dry_run=options.dry_run,
        show=lambda push: _show(push, options.dry_run, console),
    )
    if options.dry_run:
        what = "would be made" if push.new_repository else "would get one commit"
        console.print(f"Dry run: nothing was written; {push.repo_id} {what}.")
    elif push.changed:
        console.print(f"Published {', '.join(push.sae_ids)}: {push.url}")
    else:
        console.print(f"{push.repo_id} holds all of this already; nothing was changed.")


def _show(push: "Push", with_card: bool, console: PlainConsole) -> None:
    from rich.filesize import decimal

    if with_card:
        console.print(push.card)
    for path, size in push.files.items():
        console.print(f"{path}  {decimal(size)}")
    for path in push.obsolete:
        console.print(f"{path}  removed: written by an earlier push, not by this one")
    if push.levels_size:
        console.print(f"Levels as SAEs of their own add {decimal(push.levels_size)}.")
    for replacement in push.replacements:
        published = "left out" if replacement.published is None else f"published as {replacement.published!r}"
        hint = f"; if it is a name on the Hub, add --hub-name {replacement.value}" if replacement.guessed else ""
        console.print(f"{replacement.field}: {replacement.value!r} is {published}{hint}.")
    if push.note:
        console.print(push.note)
