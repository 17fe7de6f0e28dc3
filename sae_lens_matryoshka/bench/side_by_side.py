"""Which of a folder's results may stand in one table: those of the same SAEs, config, text, model and versions.

An output gathers results over many calls, in between which SAEs, models and texts may change. What is evaluated now, or
else is newest, says what the rest must have been made with.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sae_lens_matryoshka.bench.made_from import OTHER_SAE, WHOLE_SAE, config_differences, differences
from sae_lens_matryoshka.bench.result_files import Result

_OWN_TO_AN_SAE = ("sae", WHOLE_SAE, "tokens", "hook")
"""What results in one table may differ in: SAEs may be of several layers, and trained with and without BOS."""


@dataclass(frozen=True)
class Call:
    """What is evaluated now."""

    settings: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = field(default_factory=dict)
    """What results of an evaluation must have in common: SAEBench's config, as JSON has it, and by content the rest."""

    hash_of: Callable[[str, int | None], str | None] = lambda sae, level: None
    """The hash of an SAE's level as it is now; empty for a level that the SAE does not have, None for other SAEs."""

    model: Mapping[str, Any] = field(default_factory=dict)
    """Hashes of the model and its tokenizer."""

    hooks: frozenset[str] = frozenset()
    """The hooks of the SAEs; empty if they are not to be compared."""


def comparable(results: Sequence[Result], call: Call) -> tuple[list[Result], list[str]]:
    """A folder's results that may stand beside a call's, and a sentence for each SAE and evaluation left out."""
    kept, reasons = _sorted_out(results, call)
    sentences = [
        f"{evaluation} of {sae}{_levels(left_out)} is left out of table and figures: it was made with {why}; make it "
        "again with --force, or choose another --output."
        for (evaluation, sae, why), left_out in reasons.items()
    ]
    return kept, sentences


def differing(results: Sequence[Result]) -> list[str]:
    """A sentence for each SAE and evaluation whose numbers are not comparable to the newest ones of the folder."""
    _, reasons = _sorted_out([result for result in results if result.made_from], Call())
    return [
        f"{evaluation} of {sae}{_levels(left_out)} is not comparable to the newest results: it was made with {why}."
        for (evaluation, sae, why), left_out in reasons.items()
    ]


def _sorted_out(results: Sequence[Result], call: Call) -> tuple[list[Result], dict[tuple[str, str, str], list[Result]]]:
    reasons: dict[tuple[str, str, str], list[Result]] = {}
    references: dict[str, Result] = {}
    newest_of_sae: dict[str, Result] = {}
    for result in sorted(results, key=lambda result: -result.time):
        differs = (
            _differences_of_sae(result, call, newest_of_sae)
            or _differences_of_place(result, call)
            or _differences_of_settings(result, call, references)
        )
        if differs:
            reasons.setdefault((result.evaluation, result.sae, "; ".join(differs)), []).append(result)
    left_out = {id(result) for results in reasons.values() for result in results}
    return [result for result in results if id(result) not in left_out], reasons


def _differences_of_sae(result: Result, call: Call, newest_of_sae: dict[str, Result]) -> list[str]:
    now = call.hash_of(result.sae, result.level)
    if now is not None:
        return differences(result.made_from, {"sae": now})
    newest = newest_of_sae.setdefault(result.sae, result)
    return [OTHER_SAE] if result.made_from.get(WHOLE_SAE) != newest.made_from.get(WHOLE_SAE) else []


def _differences_of_place(result: Result, call: Call) -> list[str]:
    """Model and hook, which only the call knows of evaluations that it did not run."""
    was = result.made_from
    differs = differences(was, {name: value for name, value in call.model.items() if name in was})
    if call.hooks and "hook" in was and was["hook"] not in call.hooks:
        differs += [f"the hook {was['hook']}, now {' and '.join(sorted(call.hooks))}"]
    return differs


def _differences_of_settings(result: Result, call: Call, references: dict[str, Result]) -> list[str]:
    now, compared = call.settings.get(result.evaluation), [result]
    if now is None:
        reference = references.setdefault(result.evaluation, result)
        shared = {name: value for name, value in reference.made_from.items() if name not in _OWN_TO_AN_SAE}
        now, compared = (reference.config, shared), [result, reference]
    if not result.made_from:
        return ["nothing that it records"]
    config, made_from = now
    width = min(each.width for each in compared)
    without_special = any(each.metadata.get("exclude_special_tokens") for each in compared)
    was, config = (_common(each, width, without_special) for each in (result.config, config))
    return config_differences(was, config, made_from) + differences(result.made_from, made_from)


def _common(config: Mapping[str, Any], width: int, without_special: bool) -> dict[str, Any]:
    """A config without what follows from how wide an SAE is, and from how it was trained."""
    common = {**config}
    if isinstance(common.get("n_values"), list):
        common["n_values"] = [n for n in common["n_values"] if not isinstance(n, int) or n <= width]
    if without_special:
        common.pop("exclude_special_tokens_from_reconstruction", None)
    return common


def _levels(results: Sequence[Result]) -> str:
    levels = sorted(result.level for result in results if result.level is not None)
    return f" ({'level' if len(levels) == 1 else 'levels'} {', '.join(map(str, levels))})" if levels else ""
