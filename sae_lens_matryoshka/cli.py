"""The command ``sae-lens-matryoshka``: parses, calls the library, prints."""

import argparse
import logging
import math
import re
import runpy
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version

from rich.filesize import decimal
from rich.table import Table
from tqdm.contrib.logging import logging_redirect_tqdm

from sae_lens_matryoshka import hub
from sae_lens_matryoshka.config_files import read_run_file
from sae_lens_matryoshka.errors import REPORT_BUG, UserError
from sae_lens_matryoshka.levels import parse_widths
from sae_lens_matryoshka.runner import train
from sae_lens_matryoshka.saes.matryoshka_sae import MatryoshkaSAE
from sae_lens_matryoshka.saes.matryoshka_sae_kinds import MatryoshkaJumpReLUSAE, MatryoshkaTopKSAE
from sae_lens_matryoshka.terminal import PlainConsole, PlainFormatter, printable
from sae_lens_matryoshka.training.checkpointer import CheckpointOptions


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 1 or 2 the user can mend it, 130 interrupted.

    Args:
        arguments: The arguments after the program's name; None takes those of the process.
    """
    options, saelens_arguments = _parse(sys.argv[1:] if arguments is None else list(arguments))
    try:
        if options.command == "train":
            with _progress_messages():
                _train(options)
        elif options.command == "inspect":
            _inspect(options)
        elif options.command == "push":
            _push(options)
        elif options.command == "evaluate":
            _evaluate(options)
        else:
            _run_saelens(saelens_arguments)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    except (UserError, OSError) as error:
        print(printable(f"error: {' '.join(str(error).split())}"), file=sys.stderr)
        return 1
    except Exception:
        print(printable(traceback.format_exc()), file=sys.stderr)
        print(f"error: {REPORT_BUG}", file=sys.stderr)
        return 1
    return 0


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog="sae-lens-matryoshka", description="Matryoshka SAEs for SAELens.")
    parser.add_argument("--version", action="version", version=version("sae-lens-matryoshka"))
    commands = parser.add_subparsers(dest="command", required=True)

    train = commands.add_parser("train", help="train what a run file asks for with SAELens's runners")
    train.add_argument(
        "config",
        nargs="?",
        default="synthetic",
        help="a YAML file, or the name of an embedded one (default: synthetic)",
    )
    train.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="KEY.SUB=VALUE",
        help="change a field, repeatable; one of several SAEs goes by its name: saes.NAME.k=40",
    )
    train.add_argument(
        "--unset",
        action="append",
        default=[],
        metavar="KEY.SUB",
        help="take a field out of the run file, before --set, repeatable",
    )
    train.add_argument("--output", metavar="DIR", help="folder to write (default: the run file's output_path)")
    train.add_argument(
        "--resume", metavar="auto|PATH",
        help="continue from a checkpoint; auto takes the newest of the same run, starts afresh if there is none, and "
        "does nothing if the output is there",
    )  # fmt: skip
    train.add_argument("--force", action="store_true", help="replace a non-empty output folder")
    train.add_argument(
        "--calibration-samples", type=int, metavar="N",
        help="fresh activations to calibrate BatchTopK's threshold on; 0 keeps the running one (default: 100000)",
    )  # fmt: skip
    train.add_argument(
        "--measure-samples", type=int, metavar="N",
        help="fresh activations to measure the levels on (default: 100000)",
    )  # fmt: skip

    train.add_argument(
        "--exact-resume", action=argparse.BooleanOptionalAction, default=True,
        help="whether checkpoints hold the activation buffer and random states, so that a resumed run ends bit-equal "
        "(on CPU) to an uninterrupted one; otherwise they are SAELens's (default: yes)",
    )  # fmt: skip
    train.add_argument(
        "--max-buffer-gb", type=_finite, default=2.0, metavar="GB",
        help="largest activation buffer to put into checkpoints; a larger one is filled anew on resuming (default: 2)",
    )  # fmt: skip
    train.add_argument(
        "--keep-checkpoints", type=_positive, metavar="N", help="remove all but the newest N checkpoints of the run"
    )

    train.add_argument(
        "--trust-remote-code", action="store_true",
        help="let the run file's trust_remote_code run code that comes with a model or data set",
    )  # fmt: skip

    inspect = commands.add_parser("inspect", help="show the levels of a saved or published SAE")
    inspect.add_argument("sae", metavar="PATH_OR_REPO", help="a folder, a Hub repository or a SAELens release")
    inspect.add_argument("--id", help="the SAE's id in the repository or release")
    inspect.add_argument("--widths", help="level widths, where they are not recorded, as 2048,6144,...")

    push = commands.add_parser("push", help="publish saved SAEs on the Hugging Face Hub in one commit")
    push.add_argument("path", metavar="PATH", help="a saved SAE, or a folder of them")
    push.add_argument("repo_id", metavar="REPO_ID", help="the repository, as user/name; made if it does not exist")
    push.add_argument("--id", help="id of a single SAE (default: its hook's name; folders keep their names)")
    push.add_argument("--private", action="store_true", help="make a new repository private")
    push.add_argument("--revision", metavar="BRANCH", help="branch to publish on (default: the main one)")
    push.add_argument("--results", metavar="DIR", help="benchmark results to show: results.csv and PNG figures")
    push.add_argument("--levels", action="store_true", help="also publish each level as an SAE of its own")
    push.add_argument(
        "--hub-name", action="append", default=[], metavar="NAME",
        help="a model or data set in the configs that is on the Hub, where the SAE does not record it; repeatable",
    )  # fmt: skip
    push.add_argument(
        "--license", metavar="ID", help="the weights' licence for the card, such as apache-2.0 (default: as it stands)"
    )
    push.add_argument("--dry-run", action="store_true", help="print the model card and the files, write nothing")
    _add_evaluate(commands.add_parser("evaluate", help="run SAEBench on every level of SAEs (needs the extra bench)"))

    commands.add_parser(
        "saelens", add_help=False, help="SAELens's own training command, with the architecture 'matryoshka' registered"
    )
    # argparse takes "-1,0" for an option of its own
    arguments = [*arguments]
    for place in reversed(range(len(arguments) - 1)):
        if arguments[place] == "--levels" and re.fullmatch(r"-\d[-\d,]*", arguments[place + 1]):
            arguments[place : place + 2] = [f"--levels={arguments[place + 1]}"]
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command != "saelens":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return options, rest


@contextmanager
def _progress_messages() -> Iterator[None]:
    """Show this package's messages beside the progress bars; SAELens's own say no more than it lets them."""
    package, handler = logging.getLogger("sae_lens_matryoshka"), logging.StreamHandler()
    handler.setFormatter(PlainFormatter())
    level = package.level
    package.setLevel(logging.INFO)
    package.addHandler(handler)
    try:
        with logging_redirect_tqdm([package]):
            yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level)


def _add_evaluate(evaluate: argparse.ArgumentParser) -> None:
    evaluate.add_argument(
        "saes", nargs="+", metavar="[NAME=]SAE", help="a folder, or REPOSITORY:ID on the Hub; levels where it has any"
    )
    evaluate.add_argument("--model", help="folder or name of the language model (default: what the first SAE records)")
    evaluate.add_argument(
        "--evals", default="sparse_probing,tpp,scr,absorption,core,meta_structure", metavar="EVAL,...",
        help="what to run (default: %(default)s)",
    )  # fmt: skip
    evaluate.add_argument(
        "--widths", action="append", default=[], metavar="[NAME=]2048,6144,...",
        help="level widths of an SAE that does not record them; with its name where there are several, repeatable",
    )  # fmt: skip
    evaluate.add_argument("--levels", default="all", metavar="all|0,2,-1", help="which levels (default: all)")
    evaluate.add_argument("--output", required=True, metavar="DIR", help="folder to write; finished results are kept")
    evaluate.add_argument(
        "--data", action="append", default=[], metavar="NAME=FILE",
        help="labelled text of your own for probing and erasure: .jsonl, .csv or .parquet with columns text and label, "
        "for scr also second_label; repeatable",
    )  # fmt: skip
    evaluate.add_argument("--text", metavar="FILE|DIR|NAME", help="text for core (default: Skylion007/openwebtext)")
    evaluate.add_argument(
        "--set", action="append", default=[], metavar="EVAL.FIELD=VALUE",
        help="change a field of SAEBench's config, repeatable",
    )  # fmt: skip
    evaluate.add_argument("--hook", help="TransformerLens's name of the hook (default: each SAE's own)")
    evaluate.add_argument(
        "--cache", metavar="DIR", help="keep shared activations and probes there (default: in memory)"
    )
    evaluate.add_argument("--cache-size", type=_finite, default=50, metavar="GB", help="its bound (default: 50)")
    evaluate.add_argument("--device", default="cpu", help="auto takes CUDA where there is one (default: cpu)")
    evaluate.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="default: float32"
    )
    evaluate.add_argument("--force", action="store_true", help="make finished results again")


def _evaluate(options: argparse.Namespace) -> None:
    try:
        from sae_lens_matryoshka.bench.command import run_command
    except ImportError as error:
        raise UserError(str(error)) from error
    run_command(options)


def _train(options: argparse.Namespace) -> None:
    result = train(
        read_run_file(options.config, options.settings, options.unset),
        output=options.output,
        resume=options.resume,
        force=options.force,
        calibration_samples=options.calibration_samples,
        measure_samples=options.measure_samples,
        trust_remote_code=options.trust_remote_code,
        checkpointing=CheckpointOptions(
            options.exact_resume, int(options.max_buffer_gb * 1e9), options.keep_checkpoints
        ),
    )
    console = PlainConsole()
    for sae in result.saes:
        if sae.calibration is not None:
            console.print(
                f"{sae.name}: threshold moved by {sae.calibration.shift:+.4g}, mean L0 "
                f"{sae.calibration.l0_before:.2f} -> {sae.calibration.l0_after:.2f}"
            )
        if sae.levels:
            table = Table("level", "width", "L0", "FVU", "dead", title=f"{sae.name}: levels of the saved SAE")
            for level in sae.levels:
                table.add_row(
                    str(level.level), str(level.width), f"{level.l0:.2f}", f"{level.fvu:.4f}",
                    f"{level.dead} ({level.dead / level.width:.1%})",
                )  # fmt: skip
            console.print(table)
    scored = {sae.name: sae.scores for sae in result.saes if sae.scores is not None}
    if scored:
        table = Table(
            "SAE", "MCC", "F1", "parent recovery", "absorption", "explained variance", "L0", title="Synthetic model"
        )
        for name, scores in scored.items():
            table.add_row(
                name, f"{scores.mcc:.3f}", f"{scores.f1:.3f}", f"{scores.parent_recovery:.3f}",
                f"{scores.absorption:.3f}", f"{scores.explained_variance:.3f}", f"{scores.l0:.2f}",
            )  # fmt: skip
        console.print(table)
    console.print(f"{'Already done:' if result.was_finished else 'Saved to'} {result.output}", soft_wrap=True)


def _inspect(options: argparse.Namespace) -> None:
    widths = None if options.widths is None else parse_widths(options.widths)
    try:
        sae = hub.load(options.sae, options.id, widths=widths)
    except (ValueError, TypeError) as error:
        raise UserError(f"{options.sae} cannot be shown: {error}") from error

    console = PlainConsole()
    metadata = sae.cfg.metadata
    title = f"{options.sae} ({sae.saved_architecture()})"
    fires = "fires above (min / median / max)" if isinstance(sae, MatryoshkaJumpReLUSAE) else "fires"
    table = Table("level", "width", "new latents", fires, "parameters", title=title)
    narrower = 0
    for level, width in enumerate(sae.widths):
        table.add_row(
            str(level), str(width), str(width - narrower),
            _firing_rule(sae, narrower, width),
            f"{2 * width * (sae.cfg.d_in + 1) + sae.cfg.d_in:,}",
        )  # fmt: skip
        narrower = width
    console.print(table)
    facts = {
        "d_in": sae.cfg.d_in,
        "dtype": sae.cfg.dtype,
        "trained as": metadata.training_architecture,
        "k": (metadata.training_architecture_details or {}).get("k"),
        "model": metadata.model_name,
        "hook": metadata.hook_name,
        "data set": metadata.dataset_path,
        "context size": metadata.context_size,
        "SAELens version": metadata.sae_lens_training_version,
    }
    for name, value in facts.items():
        if value is not None:
            console.print(f"{name}: {value}", soft_wrap=True)


def _firing_rule(sae: MatryoshkaSAE, narrower: int, width: int) -> str:
    """What a level's own latents must do to fire."""
    if isinstance(sae, MatryoshkaTopKSAE):
        return f"the {min(sae.cfg.k, width)} largest"
    if not isinstance(sae, MatryoshkaJumpReLUSAE):
        return "above 0"
    threshold = sae.threshold[narrower:width].detach().float()
    return f"{threshold.min():.4g} / {threshold.median():.4g} / {threshold.max():.4g}"


def _push(options: argparse.Namespace) -> None:
    console = PlainConsole(soft_wrap=True)

    def show(push: hub.Push) -> None:
        if options.dry_run:
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
        show=show,
    )
    if options.dry_run:
        what = "would be made" if push.new_repository else "would get one commit"
        console.print(f"Dry run: nothing was written; {push.repo_id} {what}.")
    elif push.changed:
        console.print(f"Published {', '.join(push.sae_ids)}: {push.url}")
    else:
        console.print(f"{push.repo_id} holds all of this already; nothing was changed.")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def _run_saelens(arguments: list[str]) -> None:
    """SAELens's command takes its architectures from the registry, where importing this package has put ours."""
    warnings.filterwarnings("ignore", message=".*found in sys.modules", category=RuntimeWarning)  # runpy's, harmless
    sys.argv = ["sae-lens-matryoshka saelens", *arguments]
    runpy.run_module("sae_lens.llm_sae_training_runner", run_name="__main__")


if __name__ == "__main__":
    sys.exit(main())
