"""Saying in words where two results were made from something else: config, text, model, versions, parameters."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from sae_lens_matryoshka.bench.upstream import BaseEvalConfig

MADE_FROM = "made_from"
"""Where a result's ``sae_cfg_dict["metadata"]`` names everything that could change it, by content."""

WHOLE_SAE = "whole_sae"
"""Where that names the SAE whose level was evaluated; a level's result is the same whatever lies beyond the level."""

OTHER_SAE = "other parameters of the SAE"

_IN_WORDS = {"sae": OTHER_SAE, "model": "another model", "tokenizer": "another tokenizer"}


def config_as_json(config: BaseEvalConfig) -> dict[str, Any]:
    """A config as it is read back from a result."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def config_differences(was: Mapping[str, Any], now: Mapping[str, Any], made_from: Mapping[str, Any]) -> list[str]:
    """Where the config of a result is not the one that a new result would be made with.

    What is known by its contents, the model and local text, is not compared by its name or path.

    Args:
        was: The result's ``eval_config``.
        now: The config of a new result, as JSON has it.
        made_from: What a new result would be made from.
    """
    by_content = {"model_name": "model", "dataset": "text"}
    return [
        f"{field}={was.get(field)!r}, now {value!r}"
        for field, value in now.items()
        if was.get(field) != value and made_from.get(by_content.get(field, "")) is None
    ]


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Where what a result was made from is not what a new one would be made from, in words.

    Args:
        was: What a result was made from.
        now: The same of a new one; only what it names is compared.
    """
    return [_in_words(name, was.get(name), value) for name, value in now.items() if was.get(name) != value]


def _in_words(name: str, was: Any, now: Any) -> str:
    if name == "packages":
        versions = was if isinstance(was, dict) else {}
        return ", ".join(f"{p} {versions.get(p)}, now {v}" for p, v in now.items() if versions.get(p) != v)
    if name == "hook":
        return f"the hook {was}, now {now}"
    if name in ("limit_texts", "max_words"):
        return f"{name}={was}, now {now}"
    return _IN_WORDS.get(name, "other text")
