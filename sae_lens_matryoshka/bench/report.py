"""Running several evaluations and writing what they found: result files, one table, figures."""

import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache as remembered
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm

from sae_lens_matryoshka.bench.activation_source import ActivationSource
from sae_lens_matryoshka.bench.cache import Cache
from sae_lens_matryoshka.bench.evaluated_saes import EvaluatedSAE, grouped, hook_of, on_device
from sae_lens_matryoshka.bench.evaluation import Evaluation
from sae_lens_matryoshka.bench.figures import plot_results
from sae_lens_matryoshka.bench.made_from import config_as_json
from sae_lens_matryoshka.bench.models import Model, load_model
from sae_lens_matryoshka.bench.own_files import OWN_FILENAMES, RESULTS_FILENAME, check_own_files
from sae_lens_matryoshka.bench.random_baseline import random_baselines
from sae_lens_matryoshka.bench.result_files import read_results
from sae_lens_matryoshka.bench.results import HEADLINES, results_table
from sae_lens_matryoshka.bench.side_by_side import Call, comparable
from sae_lens_matryoshka.errors import REPORT_BUG, UserError
from sae_lens_matryoshka.saes.matryoshka_sae import MatryoshkaSAE
from sae_lens_matryoshka.untrusted.csv_tables import write_csv
from sae_lens_matryoshka.untrusted.terminal import printable


@dataclass(frozen=True)
class Report:
    """What :func:`evaluate` leaves behind."""

    output: Path
    """The folder with SAEBench's result files, ``results.csv`` and the figures."""

    results: pd.DataFrame
    """As :func:`load_results` gives them, what was made from something else left out; empty if nothing is left."""

    failures: dict[str, str] = field(default_factory=dict)
    """Evaluation -> why it could not be run, in one sentence."""

    skipped: list[str] = field(default_factory=list)
    """What evaluations left out, and what lay there before and is not comparable, a sentence each."""


def evaluate(
    saes: Sequence[EvaluatedSAE],
    model: "Model | ActivationSource | str | Path",
    output: str | Path,
    evaluations: Sequence[Evaluation],
    cache: Cache | None = None,
    hook_name: str | None = None,
    force: bool = False,
    baselines: bool = False,
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
        baselines: Whether to evaluate a random baseline beside each SAE, see :mod:`random_baseline`, where that is
            cheap: probing and core. The model's own channels are a baseline of probing in any case.

    Raises:
        UserError: If the model cannot be loaded, or the output holds files of somebody else's in the place of ours.
    """
    output = Path(output).expanduser()
    check_own_files(output, [evaluation.name for evaluation in evaluations])
    source = model if isinstance(model, ActivationSource) else ActivationSource(load_model(model), cache)
    failures: dict[str, str] = {}
    of_evaluation = {each: list(saes) for each in evaluations}
    if baselines and any(each.takes_baselines for each in evaluations):
        beside = _baselines(saes, source, hook_name)
        of_evaluation |= {each: [*saes, *beside] for each in evaluations if each.takes_baselines}
    for evaluation in evaluations:
        try:
            evaluation.run(of_evaluation[evaluation], source, output, hook_name, force)
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
    results = _results(output, of_evaluation, source, hook_name, skipped)
    if results.empty:  # nor may an earlier table or figure show what was refused
        for name in OWN_FILENAMES:
            (output / name).unlink(missing_ok=True)
    else:
        write_csv(output / RESULTS_FILENAME, results.astype(object).where(results.notna(), "").to_dict("records"))
        plot_results(results, output)
    return Report(output, results, failures, skipped)


def _baselines(saes: Sequence[EvaluatedSAE], source: ActivationSource, hook_name: str | None) -> list[EvaluatedSAE]:
    beside: list[EvaluatedSAE] = []
    for group in grouped(on_device(saes, source.device, source.dtype)):
        with suppress(UserError):  # which every evaluation says of the SAE too
            hook = hook_of(group[0].sae, hook_name)
            source.check_hook(hook, group[0])
            beside += random_baselines(group, hook, source)
    return beside


def _results(
    output: Path,
    of_evaluation: Mapping[Evaluation, Sequence[EvaluatedSAE]],
    source: ActivationSource,
    hook_name: str | None,
    skipped: list[str],
) -> pd.DataFrame:
    """What the output holds of these SAEs and of others that is comparable; what is not is added to ``skipped``."""
    try:
        found = read_results(output, HEADLINES, skipped.append)
    except UserError:
        return pd.DataFrame()
    # what was asked for and not made, and lies there from before, is of something else: the failure says of what
    asked = {(each.name, sae.name, sae.level) for each, saes in of_evaluation.items() for sae in saes}
    done = {(each.name, sae.name, sae.level) for each in of_evaluation for sae in each.done}
    found = [result for result in found if (result.evaluation, result.sae, result.level) not in asked - done]
    saes = list(dict.fromkeys(sae for saes in of_evaluation.values() for sae in saes))
    kept, left_out = comparable(found, _call(saes, source, list(of_evaluation), hook_name))
    skipped += left_out
    return results_table(kept) if kept else pd.DataFrame()


def _call(
    saes: Sequence[EvaluatedSAE], source: ActivationSource, evaluations: Sequence[Evaluation], hook_name: str | None
) -> Call:
    moved = on_device(saes, source.device, source.dtype)
    by_name = {sae.name: sae for sae in moved} | {(sae.name, sae.level): sae for sae in moved}

    @remembered
    def hash_of(name: str, level: int | None) -> str | None:
        if name not in by_name:
            return None
        sae = by_name.get((name, level)) or replace(by_name[name], level=level)
        n_levels = sae.sae.n_levels if isinstance(sae.sae, MatryoshkaSAE) else 0
        return sae.hash if level is None or level < n_levels else ""

    hooks: set[str] = set()
    for sae in saes:
        with suppress(UserError):  # which every evaluation has failed for
            hooks.add(hook_of(sae.sae, hook_name).name)
    settings = {each.name: (config_as_json(each.config), each.inputs(source)) for each in evaluations}
    model = {"model": source.model_hash, "tokenizer": source.tokenizer_hash}
    return Call(settings, hash_of, model, frozenset(hooks))
