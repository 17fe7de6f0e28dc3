"""SAEBench's result files, read back one by one, with what each was made from."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_lens_matryoshka.bench.beyond_saebench import Beyond
from sae_lens_matryoshka.bench.made_from import MADE_FROM
from sae_lens_matryoshka.errors import UserError
from sae_lens_matryoshka.untrusted.bounded import load_json


@dataclass(frozen=True)
class Result:
    """A result file."""

    path: Path
    evaluation: str
    sae: str
    level: int | None
    """Index of the level; None for SAEs without levels."""

    width: int
    d_in: int | None
    """How many channels the model has there."""

    metrics: dict[str, float]
    standard_errors: dict[str, float]
    """Of the metrics for which they are known."""

    config: dict[str, Any]
    """SAEBench's config, as JSON has it."""

    metadata: dict[str, Any]
    """The SAE's."""

    made_from: dict[str, Any]
    """What it was made from, by content; empty for results that SAEBench itself has written."""

    time: int
    """When it was made, in milliseconds since 1970."""


def read_results(folder: str | Path, evaluations: Iterable[str], warn: Callable[[str], object]) -> list[Result]:
    """The result files of a folder.

    Args:
        folder: What evaluations wrote to.
        evaluations: The names of evaluations.
        warn: What to do with the sentence that says that a file is passed over.

    Raises:
        UserError: If there are no result files, or none that can be read.
    """
    paths = [path for name in evaluations for path in sorted(Path(folder, name).glob("*_eval_results.json"))]
    paths = [path for path in paths if not path.name.startswith(".")]
    if not paths:
        raise UserError(f"There are no results in {folder}; expected files as sparse_probing/NAME_eval_results.json.")
    results: list[Result] = []
    for path in paths:
        try:
            results.append(_read(path))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            warn(f"{path} is passed over: it is not a whole result of SAEBench ({error!r}).")
    if not results:
        raise UserError(f"There are no readable results in {folder}.")
    return results


def _read(path: Path) -> Result:
    result = load_json(path.read_text(encoding="utf-8"))
    of_level = re.fullmatch(r"level_([0-9]{1,9})", result["sae_lens_id"])
    level = None if of_level is None else int(of_level[1])
    name, width = result["sae_lens_release_id"], result["sae_cfg_dict"]["d_sae"]
    measured = [item for category in result["eval_result_metrics"].values() for item in category.items()]
    metrics = {metric: value for metric, value in measured if value is not None}
    # the core evaluation's figure beyond SAEBench's own
    unstructured = result.get("eval_result_unstructured") or {}
    metrics |= {name: value for name, value in unstructured.items() if isinstance(value, float)}
    beyond = Beyond.of(unstructured)
    metrics |= beyond.metrics
    metadata = result["sae_cfg_dict"].get("metadata") or {}
    config, made_from = result.get("eval_config") or {}, metadata.get(MADE_FROM) or {}
    time = result.get("datetime_epoch_millis") or 0
    numbers = [*metrics.values(), *beyond.standard_errors.values()]
    wrong = [value for value in numbers if not isinstance(value, int | float)]
    wrong += [value for value in (config, made_from) if not isinstance(value, dict)]
    if not isinstance(name, str) or not isinstance(width, int) or not isinstance(time, int) or wrong:
        raise TypeError("values of other types than SAEBench's")
    return Result(
        path=path,
        evaluation=path.parent.name,
        sae=name,
        level=level,
        width=width,
        d_in=result["sae_cfg_dict"].get("d_in"),
        metrics=metrics,
        standard_errors=dict(beyond.standard_errors),
        config=config,
        metadata=metadata,
        made_from=made_from,
        time=time,
    )
