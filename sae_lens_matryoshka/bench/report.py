"""Running several evaluations and writing what they found: result files, one table, figures."""

import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm

from sae_lens_matryoshka.bench.activation_source import ActivationSource
from sae_lens_matryoshka.bench.cache import Cache
from sae_lens_matryoshka.bench.evaluated_saes import EvaluatedSAE
from sae_lens_matryoshka.bench.evaluation import Evaluation
from sae_lens_matryoshka.bench.figures import BY_L0_FILENAME, BY_WIDTH_FILENAME, plot_results
from sae_lens_matryoshka.bench.models import Model, load_model
from sae_lens_matryoshka.bench.results import load_results
from sae_lens_matryoshka.errors import REPORT_BUG, UserError
from sae_lens_matryoshka.untrusted.csv_tables import as_text
from sae_lens_matryoshka.untrusted.terminal import printable

RESULTS_FILENAME = "results.csv"


@dataclass(frozen=True)
class Report:
    """What :func:`evaluate` leaves behind."""

    output: Path
    """The folder with SAEBench's result files, ``results.csv`` and the figures."""

    results: pd.DataFrame
    """As :func:`load_results` gives them, without evaluations that could not be run; empty if none could."""

    failures: dict[str, str] = field(default_factory=dict)
    """Evaluation -> why it could not be run, in one sentence."""

    skipped: list[str] = field(default_factory=list)
    """SAEs that an evaluation left out, a sentence each."""


def evaluate(
    saes: Sequence[EvaluatedSAE],
    model: "Model | ActivationSource | str | Path",
    output: str | Path,
    evaluations: Sequence[Evaluation],
    cache: Cache | None = None,
    hook_name: str | None = None,
    force: bool = False,
) -> Report:
    """Run evaluations over the same SAEs, sharing the model's activations, and write everything.

    An evaluation that cannot be run, such as for data that cannot be fetched, or that fails, is reported; the others
    still run.

    Args:
        saes: What to evaluate; see :func:`levels`.
        model: The model, its name or folder, or a source of its activations.
        output: The folder to write to. Finished results in it are kept.
        evaluations: What to run.
        cache: Where to keep what is shared; None keeps it in memory.
        hook_name: TransformerLens's name of the hook; None takes each SAE's own.
        force: Whether finished results are made again.

    Raises:
        UserError: If the model cannot be loaded.
    """
    output = Path(output)
    source = model if isinstance(model, ActivationSource) else ActivationSource(load_model(model), cache)
    failures: dict[str, str] = {}
    for evaluation in evaluations:
        try:
            evaluation.run(saes, source, output, hook_name, force)
        except UserError as error:
            failures[evaluation.name] = str(error)
            tqdm.write(printable(f"{evaluation.name} could not be run: {error}"))
        except (OSError, torch.OutOfMemoryError) as error:
            failures[evaluation.name] = f"{error}; make room, or lower its llm_batch_size, and run again"
            tqdm.write(printable(f"{evaluation.name} broke off: {error}"))
        except Exception as error:  # the others run all the same
            failures[evaluation.name] = f"{type(error).__name__}: {error}. {REPORT_BUG}"
            tqdm.write(printable(traceback.format_exc()), file=sys.stderr)
    skipped = [sentence for evaluation in evaluations for sentence in evaluation.skipped]
    try:
        results = _without_refused(load_results(output, skipped.append), saes, evaluations)
    except UserError:
        results = pd.DataFrame()
    if results.empty:  # nor may an earlier table or figure show what was refused
        for name in (RESULTS_FILENAME, BY_WIDTH_FILENAME, BY_L0_FILENAME):
            (output / name).unlink(missing_ok=True)
        return Report(output, results, failures, skipped)
    texts = {column: results[column].map(as_text) for column in ("sae", "evaluation", "metric")}
    results.assign(**texts).to_csv(output / RESULTS_FILENAME, index=False)
    plot_results(results, output)
    return Report(output, results, failures, skipped)


def _without_refused(
    results: pd.DataFrame, saes: Sequence[EvaluatedSAE], evaluations: Sequence[Evaluation]
) -> pd.DataFrame:
    """Results without those of these SAEs that lay there before and were not made again: they are of something else."""
    asked = {(evaluation.name, sae.name, sae.level) for evaluation in evaluations for sae in saes}
    done = {(evaluation.name, sae.name, sae.level) for evaluation in evaluations for sae in evaluation.done}
    keys = zip(results["evaluation"], results["sae"], results["level"], strict=True)
    stale = [(e, sae, None if pd.isna(level) else int(level)) in asked - done for e, sae, level in keys]
    return results.loc[[not is_stale for is_stale in stale]].reset_index(drop=True)
