"""``evaluate``: SAEs and evaluations by name, to one table of all levels."""

import argparse
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml
from rich.measure import Measurement
from rich.table import Column, Table

from sae_lens_matryoshka.cli.arguments import finite_number, parse_widths, positive_count
from sae_lens_matryoshka.cli.loading import load_saelens
from sae_lens_matryoshka.errors import UserError
from sae_lens_matryoshka.run_files.saes import same_folder, why_no_folder
from sae_lens_matryoshka.untrusted.bounded import load_yaml
from sae_lens_matryoshka.untrusted.terminal import PlainConsole

if TYPE_CHECKING:
    import pandas as pd

    from sae_lens_matryoshka.bench.evaluation import Evaluation

DEFAULT_EVALUATIONS = ("sparse_probing", "tpp", "scr", "absorption", "core", "meta_structure")
EVALUATIONS = (*DEFAULT_EVALUATIONS, "sparse_probing_sae_probes")
LIMITED_BY_TEXTS = {"sparse_probing", "sparse_probing_sae_probes", "tpp", "scr"}
FEWEST_TEXTS = 10

ON_ERASURE = (
    "TPP and SCR are noisy and should not decide between SAEs (arXiv:2605.18229); the most reliable of SAEBench's "
    "evaluations is sparse_probing_sae_probes."
)


class Setting(NamedTuple):
    """What ``--set`` says."""

    evaluation: str
    field: str
    value: Any


class Request(NamedTuple):
    """The arguments, taken apart."""

    places: list[tuple[str, str]]
    """Name and place of each SAE."""

    widths: dict[str, list[int]]
    """Widths given by hand, by the name of the SAE."""

    levels: list[int] | None
    """Which levels; None for all."""

    evaluations: list[str]
    settings: list[Setting]
    data: list[tuple[str, str]]
    """Name and file of each labelled text."""


def add_to(commands: Any) -> None:
    """Add the command to the parser's."""
    parser = commands.add_parser("evaluate", help="run SAEBench on every level of SAEs (needs the extra bench)")
    parser.add_argument(
        "saes", nargs="+", metavar="[NAME=]SAE", help="a folder, or REPOSITORY:ID on the Hub; levels where it has any"
    )
    parser.add_argument("--model", help="folder or name of the language model (default: what the first SAE records)")
    parser.add_argument(
        "--evals", default=",".join(DEFAULT_EVALUATIONS), metavar="EVAL,...",
        help="what to run (default: %(default)s); also sparse_probing_sae_probes, 113 probing tasks without a "
        "download, hours on a CPU without --limit-texts. " + ON_ERASURE,
    )  # fmt: skip
    parser.add_argument(
        "--widths", action="append", default=[], metavar="[NAME=]2048,6144,...",
        help="level widths of an SAE that does not record them; with its name where there are several, repeatable",
    )  # fmt: skip
    parser.add_argument("--levels", default="all", metavar="all|0,2,-1", help="which levels (default: all)")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write; finished results are kept")
    parser.add_argument(
        "--data", action="append", default=[], metavar="NAME=FILE",
        help="labelled text of your own for probing and erasure: .jsonl, .csv or .parquet with columns text and label, "
        "for scr also second_label; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--limit-texts", type=positive_count, metavar="N",
        help="a quick look: probing, tpp and scr train on N texts of each class at most and test on N, "
        "sparse_probing_sae_probes on N of each task; results say so",
    )  # fmt: skip
    parser.add_argument(
        "--absorption-max-words", type=positive_count, metavar="N",
        help="let absorption draw N words of the vocabulary (default: all, hours on a CPU with Gemma's)",
    )  # fmt: skip
    parser.add_argument(
        "--baselines", action=argparse.BooleanOptionalAction, default=True,
        help="evaluate beside each SAE one of random directions and much the same L0, in probing, core (default: on)",
    )  # fmt: skip
    parser.add_argument("--text", metavar="FILE|DIR|NAME", help="text for core (default: Skylion007/openwebtext)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="EVAL.FIELD=VALUE",
        help="change a field of SAEBench's config, repeatable",
    )  # fmt: skip
    parser.add_argument("--hook", help="TransformerLens's name of the hook (default: each SAE's own)")
    parser.add_argument("--cache", metavar="DIR", help="keep shared activations and probes there (default: in memory)")
    parser.add_argument("--cache-size", type=finite_number, default=50, metavar="GB", help="its bound (default: 50)")
    parser.add_argument("--device", default="cpu", help="auto takes CUDA where there is one (default: cpu)")
    parser.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="default: float32"
    )
    parser.add_argument("--force", action="store_true", help="make finished results again")
    parser.set_defaults(run=run)


def join_negative_levels(arguments: list[str]) -> list[str]:
    """The arguments with ``--levels -1,0`` as ``--levels=-1,0``, which argparse else takes for an option of its own."""
    joined = [*arguments]
    for place in reversed(range(len(joined) - 1)):
        if joined[place] == "--levels" and re.fullmatch(r"-\d[-\d,]*", joined[place + 1]):
            joined[place : place + 2] = [f"--levels={joined[place + 1]}"]
    return joined


def run(options: argparse.Namespace) -> None:
    """Evaluate and print the table.

    Raises:
        UserError: If an argument cannot be used, or, when all else is done, if an evaluation could not be run.
    """
    request = parse_request(options)
    load_saelens()
    try:
        from sae_lens_matryoshka.bench import ActivationSource, LabelledText, load_model
        from sae_lens_matryoshka.bench import evaluate as run_evaluations
        from sae_lens_matryoshka.bench.by_name import build_evaluations, load_saes
        from sae_lens_matryoshka.bench.cache import Cache
        from sae_lens_matryoshka.bench.own_files import RESULTS_FILENAME, check_own_files
        from sae_lens_matryoshka.bench.results import headline_table
    except ImportError as error:
        raise UserError(str(error)) from error
    from sae_lens_matryoshka.devices import resolve_device

    check_own_files(Path(options.output), request.evaluations)
    device = resolve_device(options.device, "--device")
    data = [LabelledText.from_file(file, name) for name, file in request.data]
    evaluations = build_evaluations(
        request.evaluations, request.settings, data, options.text, options.limit_texts, options.absorption_max_words
    )
    saes, recorded_model = load_saes(request.places, request.widths, request.levels, device, options.dtype)
    model_name = options.model or recorded_model()
    if model_name is None:
        raise UserError(f"{options.saes[0]} does not record its model; name it with --model.")
    cache = Cache(options.cache, round(options.cache_size * 10**9))
    source = ActivationSource(load_model(model_name, device, options.dtype), cache)
    report = run_evaluations(
        saes,
        source,
        options.output,
        evaluations,
        hook_name=options.hook,
        force=options.force,
        baselines=options.baselines,
    )

    console = PlainConsole()
    if not report.results.empty:
        table = _table(headline_table(report.results), headline_table(report.results, "standard_error"))
        needed = Measurement.get(console, console.options, table).minimum
        console.print(table, width=max(console.width, needed), crop=False)
        console.print("After ±: the standard error over test texts, sequences or letters.", soft_wrap=True)
        if {"tpp", "scr"} & set(report.results["evaluation"]):
            console.print(ON_ERASURE, soft_wrap=True)
        console.print(f"Results, figures and {RESULTS_FILENAME} are in {report.output}", soft_wrap=True)
    for sentence in [*report.skipped, *_unused(options, evaluations)]:
        console.print(sentence, soft_wrap=True)
    console.print(str(cache), soft_wrap=True)
    if report.failures:
        raise UserError(" ".join(f"{name} failed: {why}" for name, why in report.failures.items()))


def parse_request(options: argparse.Namespace) -> Request:
    """Take the arguments apart.

    Raises:
        UserError: If one of them cannot be used.
    """
    for option in ("output", "model", "text", "hook", "cache"):
        if getattr(options, option) == "":
            raise UserError(f"--{option} is empty; give it a value, or leave it out.")
    for option in ("output", "model", "text", "cache"):  # a shell leaves a ~ after = as it is
        if (value := getattr(options, option)) is not None:
            setattr(options, option, os.path.expanduser(value))
    if os.path.exists(options.output) and not os.path.isdir(options.output):
        raise UserError(f"--output {options.output} is a file; name a folder.")
    if options.cache_size < 0:
        raise UserError(f"--cache-size {options.cache_size:g} must be 0 or above.")
    evaluations = [name.strip() for name in options.evals.split(",")]
    for name in evaluations:
        if name not in EVALUATIONS:
            raise UserError(f"There is no evaluation {name!r}; choose from {', '.join(EVALUATIONS)}.")
    if options.limit_texts is not None and not LIMITED_BY_TEXTS & set(evaluations):
        raise UserError(f"--limit-texts is for {', '.join(sorted(LIMITED_BY_TEXTS))}; leave it out.")
    if options.limit_texts is not None and options.limit_texts < FEWEST_TEXTS:
        raise UserError(
            f"--limit-texts {options.limit_texts} are too few texts for a probe; give {FEWEST_TEXTS} or more."
        )
    if options.absorption_max_words is not None and "absorption" not in evaluations:
        raise UserError("--absorption-max-words is for absorption, which is not among the evaluations; leave it out.")
    settings = [_parse_setting(text) for text in options.set]
    for text, setting in zip(options.set, settings, strict=True):
        if setting.evaluation not in evaluations:
            raise UserError(
                f"--set {text}: {setting.evaluation!r} is not among the evaluations to run ({', '.join(evaluations)})."
            )
        if options.text is not None and setting[:2] == ("core", "dataset"):
            raise UserError(f"--text {options.text} and --set {text} name two texts for core; leave one out.")
    data = [_parse_data(text) for text in options.data]
    names = [name for name, _ in data]
    if len(set(names)) < len(names):
        raise UserError(f"Two files of --data have the same name, of {', '.join(names)}; give each its own.")
    levels = None if options.levels == "all" else _parse_levels(options.levels)
    places = [_name_and_place(text) for text in options.saes]
    folders = [same_folder(name) for name, _ in places]
    if len(set(folders)) < len(folders):
        raise UserError(
            f"Two of the SAEs {', '.join(name for name, _ in places)} would have the same result files; give each a "
            f"name of its own as NAME=SAE."
        )
    widths = _widths_by_name(options.widths, [name for name, _ in places])
    return Request(places, widths, levels, evaluations, settings, data)


def _parse_setting(setting: str) -> Setting:
    key, separator, value = setting.partition("=")
    name, dot, field = key.partition(".")
    if not separator or not dot:
        raise UserError(f"--set {setting!r} must be EVALUATION.FIELD=VALUE, as absorption.min_feats_for_eval=5.")
    try:
        return Setting(name, field, load_yaml(value))
    except yaml.YAMLError as error:
        raise UserError(f"--set {setting!r}: the value is not YAML.") from error


def _parse_levels(text: str) -> list[int]:
    try:
        return [int(level) for level in text.split(",")]
    except ValueError:
        raise UserError(f"--levels {text!r} must be all, or whole numbers separated by commas, as 0,2,-1.") from None


def _parse_data(text: str) -> tuple[str, str]:
    name, separator, file = text.partition("=")
    if not separator:
        raise UserError(f"--data {text!r} must be NAME=FILE.")
    return name, os.path.expanduser(file)


def _name_and_place(text: str) -> tuple[str, str]:
    """``[NAME=]FOLDER`` or ``[NAME=]REPOSITORY:ID`` in two; folders may have ``=`` in their names too."""
    name, separator, where = text.partition("=")
    if not separator or os.path.exists(os.path.expanduser(text)):
        name, where = "", text
    where = os.path.expanduser(where)
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


def _unused(options: argparse.Namespace, evaluations: "Sequence[Evaluation[Any]]") -> Iterator[str]:
    """What was given on the command line and no evaluation has asked for, a sentence each."""
    if options.text is not None and "core" not in {evaluation.name for evaluation in evaluations}:
        yield f"--text {options.text} was not used: core was not among the evaluations."
    used = {name for evaluation in evaluations for name in getattr(evaluation.config, "dataset_names", [])}
    for text in options.data:
        if text.partition("=")[0] not in used:
            yield f"--data {text} was not used: no evaluation has read it."


def _table(headlines: "pd.DataFrame", errors: "pd.DataFrame") -> Table:
    import pandas as pd

    def cell(value: Any, form: str, before: str = "") -> str:
        return "" if pd.isna(value) else before + format(value, form)

    name = Column("SAE", no_wrap=True, min_width=max(map(len, headlines["sae"])))
    numbers = (Column(label, no_wrap=True) for label in ("level", "width", "L0"))
    table = Table(
        name, *numbers, *(Column(label, min_width=max(map(len, label.split()))) for label in headlines.columns[4:])
    )
    for row, of_row in zip(headlines.itertuples(index=False), errors.itertuples(index=False), strict=True):
        sae, level, width, l0, *scores = row
        cells = (
            f"{cell(score, '.3f')}\n{cell(error, '.3f', '±')}" for score, error in zip(scores, of_row[4:], strict=True)
        )
        table.add_row(sae, cell(level, ""), str(width), cell(l0, ".1f"), *cells)
    return table
