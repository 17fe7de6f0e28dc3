"""``train``: a run file and what the command line changes of it, to trained SAEs and tables of their levels."""

import argparse
from typing import TYPE_CHECKING, Any

from rich.table import Table

from sae_lens_matryoshka.cli.arguments import add_run_file_arguments, finite_number, positive_count
from sae_lens_matryoshka.cli.loading import load_saelens
from sae_lens_matryoshka.cli.progress import progress_messages
from sae_lens_matryoshka.errors import UserError
from sae_lens_matryoshka.run_files.checking import check_run_file
from sae_lens_matryoshka.run_files.reading import read_run_file
from sae_lens_matryoshka.saved.level_figures import levels_table
from sae_lens_matryoshka.training.options import CheckpointOptions, check_sample_numbers
from sae_lens_matryoshka.untrusted.terminal import PlainConsole

if TYPE_CHECKING:
    from sae_lens_matryoshka.training.run import TrainResult

DEMONSTRATION = "synthetic"
"""The run file that is taken if none is named."""


def add_to(commands: Any) -> None:
    """Add the command to the parser's."""
    parser = commands.add_parser("train", help="train what a run file asks for with SAELens's runners")
    parser.add_argument(
        "config", nargs="?",
        help=f"a YAML file, or the name of an embedded one (default: {DEMONSTRATION}, a demonstration of two minutes)",
    )  # fmt: skip
    add_run_file_arguments(parser)
    parser.add_argument("--output", metavar="DIR", help="folder to write (default: the run file's output_path)")
    parser.add_argument(
        "--resume", metavar="auto|PATH",
        help="continue from a checkpoint; auto takes the newest of the same run, starts afresh if there is none, and "
        "does nothing if the output is there",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="replace a non-empty output folder")
    parser.add_argument(
        "--calibration-samples", type=int, metavar="N",
        help="fresh activations to calibrate BatchTopK's threshold on; 0 keeps the running one (default: 100000)",
    )  # fmt: skip
    parser.add_argument(
        "--measure-samples", type=int, metavar="N",
        help="fresh activations to measure the levels on (default: 100000)",
    )  # fmt: skip
    parser.add_argument(
        "--exact-resume", action=argparse.BooleanOptionalAction, default=True,
        help="whether checkpoints hold the activation buffer and random states, so that a resumed run ends bit-equal "
        "(on CPU) to an uninterrupted one; otherwise they are SAELens's (default: yes)",
    )  # fmt: skip
    parser.add_argument(
        "--max-buffer-gb", type=finite_number, default=2.0, metavar="GB",
        help="largest activation buffer to put into checkpoints; a larger one is filled anew on resuming (default: 2)",
    )  # fmt: skip
    parser.add_argument(
        "--keep-checkpoints", type=positive_count, metavar="N",
        help="remove all but the newest N checkpoints of the run",
    )  # fmt: skip
    parser.add_argument(
        "--activations", metavar="DIR",
        help="train from the activations that the command cache has written there, without the language model",
    )  # fmt: skip
    parser.add_argument(
        "--sample-pool", type=positive_count, metavar="N",
        help="draw N samples of a synthetic model once, for all SAEs and epochs, rather than every batch afresh",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Train and print what came out.

    Raises:
        UserError: If something cannot be used or done.
    """
    console = PlainConsole()
    run_file = read_run_file(options.config or DEMONSTRATION, options.settings, options.unset)
    check_run_file(run_file, options.trust_remote_code)
    check_sample_numbers(options.calibration_samples, options.measure_samples)
    checkpointing = CheckpointOptions(options.exact_resume, int(options.max_buffer_gb * 1e9), options.keep_checkpoints)
    if options.config is None:
        console.print(
            f"No run file is named, so this is the demonstration, {DEMONSTRATION}: a Matryoshka and a BatchTopK SAE on "
            f"synthetic data with known features, about two minutes on two CPU cores, into "
            f"{options.output or run_file['output_path']}.",
            soft_wrap=True,
        )
    load_saelens()
    from sae_lens_matryoshka.training.run import train

    with progress_messages():
        result = train(
            run_file,
            output=options.output,
            resume=options.resume,
            force=options.force,
            calibration_samples=options.calibration_samples,
            measure_samples=options.measure_samples,
            trust_remote_code=options.trust_remote_code,
            checkpointing=checkpointing,
            activations=options.activations,
            sample_pool=options.sample_pool,
        )
    _show(result, console)
    if incomplete := ", ".join(sae.name for sae in result.saes if sae.incomplete is not None):
        raise UserError(f"Not everything could be made of {incomplete}; the warnings above say what and why.")


def _show(result: "TrainResult", console: PlainConsole) -> None:
    for sae in result.saes:
        if sae.calibration is not None:
            console.print(
                f"{sae.name}: threshold moved by {sae.calibration.shift:+.4g}, mean L0 "
                f"{sae.calibration.l0_before:.2f} -> {sae.calibration.l0_after:.2f}"
            )
        if sae.levels:
            console.print(levels_table(sae.levels, f"{sae.name}: levels of the saved SAE"))
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
