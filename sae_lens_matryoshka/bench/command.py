"""The command ``sae-lens-matryoshka evaluate``: from its arguments to SAEs, evaluations and a table."""

import argparse
import dataclasses
import difflib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from pydantic import ValidationError
from rich.table import Column, Table
from sae_lens import SAE

from sae_lens_matryoshka.bench.absorption import Absorption
from sae_lens_matryoshka.bench.activation_source import ActivationSource
from sae_lens_matryoshka.bench.cache import Cache
from sae_lens_matryoshka.bench.concept_erasure import ConceptErasure
from sae_lens_matryoshka.bench.core import Core
from sae_lens_matryoshka.bench.evaluated_saes import levels
from sae_lens_matryoshka.bench.evaluation import Evaluation
from sae_lens_matryoshka.bench.labelled_text import LabelledText
from sae_lens_matryoshka.bench.meta_structure import MetaStructure
from sae_lens_matryoshka.bench.models import load_model
from sae_lens_matryoshka.bench.report import RESULTS_FILENAME, evaluate
from sae_lens_matryoshka.bench.results import headline_table
from sae_lens_matryoshka.bench.sparse_probing import SparseProbing
from sae_lens_matryoshka.bench.upstream import (
    AbsorptionEvalConfig,
    BaseEvalConfig,
    CoreEvalConfig,
    MetaStructureEvalConfig,
    ScrAndTppEvalConfig,
    SparseProbingEvalConfig,
)
from sae_lens_matryoshka.bounded import load_yaml
from sae_lens_matryoshka.data_files import READERS
from sae_lens_matryoshka.devices import resolve_device
from sae_lens_matryoshka.errors import UserError
from sae_lens_matryoshka.hub.loading import load_any
from sae_lens_matryoshka.levels import parse_widths
from sae_lens_matryoshka.run_file_saes import why_no_folder
from sae_lens_matryoshka.terminal import PlainConsole
from sae_lens_matryoshka.trained_from import recorded_model
from sae_lens_matryoshka.training.data_set import open_text_file

_EXCLUDES = "exclude_special_tokens_from_reconstruction"

CONFIGS: dict[str, type[BaseEvalConfig]] = {
    "sparse_probing": SparseProbingEvalConfig,
    "tpp": ScrAndTppEvalConfig,
    "scr": ScrAndTppEvalConfig,
    "absorption": AbsorptionEvalConfig,
    "core": CoreEvalConfig,
    "meta_structure": MetaStructureEvalConfig,
}
"""SAEBench's config, by the name of an evaluation."""


def run_command(options: argparse.Namespace) -> None:
    """Do what the command line asks for and print the table.

    Args:
        options: The arguments of ``evaluate``.

    Raises:
        UserError: If an argument cannot be used, or, when all else is done, if an evaluation could not be run.
    """
    device = resolve_device(options.device, "--device")
    if os.path.exists(options.output) and not os.path.isdir(options.output):
        raise UserError(f"--output {options.output} is a file; name a folder.")
    if options.cache_size < 0:
        raise UserError(f"--cache-size {options.cache_size:g} must be 0 or above.")
    data = [_read_data(text) for text in options.data]
    names = [name.strip() for name in options.evals.split(",")]
    evaluations = build_evaluations(names, options.set, data, options.text)
    which = None if options.levels == "all" else _parse_levels(options.levels)
    places = [_name_and_place(text) for text in options.saes]
    widths = _widths_by_name(options.widths, [name for name, _ in places])
    loaded = [(name, _load_sae(where, widths.get(name), device, options.dtype)) for name, where in places]
    saes = [evaluated for name, sae in loaded for evaluated in levels(name, sae, which)]
    model_name = options.model or recorded_model(loaded[0][1].cfg.metadata)
    if model_name is None:
        raise UserError(f"{options.saes[0]} does not record its model; name it with --model.")
    cache = Cache(options.cache, round(options.cache_size * 10**9))
    source = ActivationSource(load_model(model_name, device, options.dtype), cache)
    report = evaluate(saes, source, options.output, evaluations, hook_name=options.hook, force=options.force)

    console = PlainConsole()
    if not report.results.empty:
        console.print(_table(headline_table(report.results)))
        console.print(f"Results, figures and {RESULTS_FILENAME} are in {report.output}", soft_wrap=True)
    for sentence in [*report.skipped, *_unused(options, evaluations)]:
        console.print(sentence, soft_wrap=True)
    console.print(str(cache), soft_wrap=True)
    if report.failures:
        raise UserError(" ".join(f"{name} failed: {why}" for name, why in report.failures.items()))


def build_evaluations(
    names: Sequence[str], settings: Sequence[str], data: Sequence[LabelledText], text: str | None
) -> list[Evaluation]:
    """The evaluations of these names with SAEBench's default configs, changed by the settings.

    Args:
        names: Names of evaluations.
        settings: ``EVALUATION.FIELD=VALUE`` each, where the value is YAML.
        data: The user's own labelled text, in place of SAEBench's data sets.
        text: The user's own text for the core evaluation.

    Raises:
        UserError: If there is no such evaluation or field, or SAEBench refuses a value.
    """
    for name in names:
        if name not in CONFIGS:
            raise UserError(f"There is no evaluation {name!r}; choose from {', '.join(CONFIGS)}.")
    data_names = [labelled.name for labelled in data]
    if len(set(data_names)) < len(data_names):
        raise UserError(f"Two files of --data have the same name, of {', '.join(data_names)}; give each its own.")
    changes: dict[str, dict[str, Any]] = {name: {} for name in names}
    if data:
        for name in {"sparse_probing", "tpp", "scr"} & set(names):
            changes[name]["dataset_names"] = data_names
    if text is not None and "core" in names:
        changes["core"]["dataset"] = text
        if Path(text).suffix in READERS:
            open_text_file(text)  # raises where it cannot be used
    for setting in settings:
        name, field, value = _parse_setting(setting)
        if name not in changes:
            raise UserError(f"--set {setting}: {name!r} is not among the evaluations to run ({', '.join(names)}).")
        if text is not None and (name, field) == ("core", "dataset"):
            raise UserError(f"--text {text} and --set {setting} name two texts for core; leave one out.")
        changes[name][field] = value
    configs = {name: _config(name, changes[name]) for name in names}
    build = {
        "sparse_probing": lambda config: SparseProbing(config, data),
        "tpp": lambda config: ConceptErasure(config, data),
        "scr": lambda config: ConceptErasure(config, data),
        "absorption": Absorption,
        "core": lambda config: Core(config, follow_training=_EXCLUDES not in changes["core"]),
        "meta_structure": MetaStructure,
    }
    return [build[name](config) for name, config in configs.items()]


def _unused(options: argparse.Namespace, evaluations: Sequence[Evaluation]) -> Iterator[str]:
    """What was given on the command line and no evaluation has asked for, a sentence each."""
    if options.text is not None and not any(isinstance(evaluation, Core) for evaluation in evaluations):
        yield f"--text {options.text} was not used: core was not among the evaluations."
    used = {name for evaluation in evaluations for name in getattr(evaluation.config, "dataset_names", [])}
    for text in options.data:
        if text.partition("=")[0] not in used:
            yield f"--data {text} was not used: no evaluation has read it."


def _config(name: str, changes: dict[str, Any]) -> Any:
    config_class = CONFIGS[name]
    valid = [field.name for field in dataclasses.fields(config_class)]
    for field in changes:
        if field not in valid:
            nearest = difflib.get_close_matches(field, valid, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; there are {', '.join(valid)}."
            raise UserError(f"{name}.{field} is not a field of SAEBench's {config_class.__name__}{hint}")
    if name in ("tpp", "scr"):
        changes = {**changes, "perform_scr": name == "scr"}
    try:
        return config_class(**changes)
    except ValidationError as error:
        problem = error.errors()[0]
        raise UserError(
            f"{name}.{'.'.join(map(str, problem['loc']))}={problem['input']!r}: {problem['msg']}."
        ) from error


def _parse_setting(setting: str) -> tuple[str, str, Any]:
    key, separator, value = setting.partition("=")
    name, dot, field = key.partition(".")
    if not separator or not dot:
        raise UserError(f"--set {setting!r} must be EVALUATION.FIELD=VALUE, as absorption.min_feats_for_eval=5.")
    try:
        return name, field, load_yaml(value)
    except yaml.YAMLError as error:
        raise UserError(f"--set {setting!r}: the value is not YAML.") from error


def _parse_levels(text: str) -> list[int]:
    try:
        return [int(level) for level in text.split(",")]
    except ValueError:
        raise UserError(f"--levels {text!r} must be all, or whole numbers separated by commas, as 0,2,-1.") from None


def _read_data(text: str) -> LabelledText:
    name, separator, path = text.partition("=")
    if not separator:
        raise UserError(f"--data {text!r} must be NAME=FILE.")
    return LabelledText.from_file(path, name)


def _name_and_place(text: str) -> tuple[str, str]:
    """``[NAME=]FOLDER`` or ``[NAME=]REPOSITORY:ID`` in two; folders may have ``=`` in their names too."""
    name, separator, where = text.partition("=")
    if not separator or os.path.exists(text):
        name, where = "", text
    name = name or (Path(where).resolve() if os.path.exists(where) else Path(where)).name.replace(":", "_")
    if reason := why_no_folder(name):
        raise UserError(
            f"The name {name!r} of {text} cannot be that of result files, since it {reason}; give it one of letters, "
            f"digits, '-' and '_' as NAME={where}."
        )
    return name, where


def _widths_by_name(texts: Sequence[str], names: Sequence[str]) -> dict[str, list[int]]:
    """What ``--widths`` says of which SAE."""
    by_name: dict[str, list[int]] = {}
    for text in texts:
        name, separator, widths = text.rpartition("=")
        if not separator and len(names) == 1:
            name = names[0]
        if name not in names or name in by_name:
            raise UserError(
                f"--widths {text!r} must be NAME=WIDTHS, NAME one of {', '.join(names)}, each once at most."
            )
        by_name[name] = parse_widths(widths)
    return by_name


def _load_sae(where: str, widths: Sequence[int] | None, device: str, dtype: str) -> SAE[Any]:
    repository, colon, sae_id = where.partition(":")
    source, sae_id = (repository, sae_id) if colon and not os.path.exists(where) else (where, None)
    try:
        return load_any(source, sae_id, widths=widths, device=device, dtype=dtype)
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"{where} cannot be loaded: {error}") from error


def _table(headlines: pd.DataFrame) -> Table:
    table = Table(
        Column("SAE", no_wrap=True, min_width=max(map(len, headlines["sae"]))),
        "level",
        "width",
        "L0",
        *headlines.columns[4:],
    )
    for row in headlines.itertuples(index=False):
        level = "" if pd.isna(row[1]) else str(row[1])
        l0 = "" if pd.isna(row[3]) else f"{row[3]:.1f}"
        table.add_row(
            str(row[0]), level, str(row[2]), l0, *("" if pd.isna(value) else f"{value:.3f}" for value in row[4:])
        )
    return table
