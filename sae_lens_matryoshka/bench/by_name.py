"""SAEs and evaluations as a command line names them."""

import dataclasses
import difflib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from sae_lens import SAE

from sae_lens_matryoshka.bench.absorption import Absorption
from sae_lens_matryoshka.bench.concept_erasure import ConceptErasure
from sae_lens_matryoshka.bench.core import Core
from sae_lens_matryoshka.bench.evaluated_saes import EvaluatedSAE, levels
from sae_lens_matryoshka.bench.evaluation import Evaluation
from sae_lens_matryoshka.bench.labelled_text import LabelledText
from sae_lens_matryoshka.bench.meta_structure import MetaStructure
from sae_lens_matryoshka.bench.sparse_probing import SparseProbing
from sae_lens_matryoshka.bench.upstream import (
    AbsorptionEvalConfig,
    BaseEvalConfig,
    CoreEvalConfig,
    MetaStructureEvalConfig,
    ScrAndTppEvalConfig,
    SparseProbingEvalConfig,
)
from sae_lens_matryoshka.errors import UserError
from sae_lens_matryoshka.saes.loading import load_any
from sae_lens_matryoshka.saved.trained_from import recorded_model
from sae_lens_matryoshka.text.data_files import READERS
from sae_lens_matryoshka.text.data_set import open_text_file

CONFIGS: dict[str, type[BaseEvalConfig]] = {
    "sparse_probing": SparseProbingEvalConfig,
    "tpp": ScrAndTppEvalConfig,
    "scr": ScrAndTppEvalConfig,
    "absorption": AbsorptionEvalConfig,
    "core": CoreEvalConfig,
    "meta_structure": MetaStructureEvalConfig,
}
"""SAEBench's config, by the name of an evaluation; that of sae_probes takes ten seconds to import."""

TEXT_COUNTS = (
    ("sparse_probing", "probe_train_set_size"),
    ("sparse_probing", "probe_test_set_size"),
    *((name, field) for name in ("tpp", "scr") for field in ("train_set_size", "test_set_size")),
)
"""Where configs say how many texts a probe has."""


def load_saes(
    places: Iterable[tuple[str, str]],
    widths: Mapping[str, Sequence[int]],
    which: Sequence[int] | None,
    device: str,
    dtype: str,
) -> tuple[list[EvaluatedSAE], Callable[[], str | None]]:
    """Load SAEs, or their levels where they have any.

    Args:
        places: Name and place of each: a folder, or ``REPOSITORY:ID``.
        widths: Level widths given by hand, by name.
        which: Indices of levels; None for all.
        device: Where to load to.
        dtype: The data type to load as.

    Returns:
        What is to be evaluated, and what gives the model that the first SAE records.

    Raises:
        UserError: If one of them cannot be loaded, or has no such level.
    """
    loaded = [(name, _load_sae(where, widths.get(name), device, dtype)) for name, where in places]
    saes = [evaluated for name, sae in loaded for evaluated in levels(name, sae, which)]
    return saes, lambda: recorded_model(loaded[0][1].cfg.metadata)


def build_evaluations(
    names: Sequence[str],
    settings: Iterable[tuple[str, str, Any]],
    data: Sequence[LabelledText],
    text: str | None,
    limit_texts: int | None = None,
    max_words: int | None = None,
) -> list[Evaluation[Any]]:
    """The evaluations of these names with SAEBench's default configs, changed by the settings.

    Args:
        names: Names of evaluations.
        settings: Changes of their configs: name of the evaluation, field, value.
        data: The user's own labelled text, in place of SAEBench's data sets.
        text: The user's own text for the core evaluation.
        limit_texts: How many texts of each class to train on at most, and how many to test on, of each data set; the
            configs say so afterwards.
        max_words: How many words of the vocabulary the absorption evaluation draws.

    Raises:
        UserError: If there is no such field, or SAEBench refuses a value.
    """
    changes: dict[str, dict[str, Any]] = {name: {} for name in names}
    if data:
        for name in {"sparse_probing", "tpp", "scr"} & set(names):
            changes[name]["dataset_names"] = [labelled.name for labelled in data]
    if text is not None and "core" in names:
        changes["core"]["dataset"] = text
        if Path(text).suffix in READERS:
            open_text_file(text)  # raises where it cannot be used
    for name, field, value in settings:
        changes[name][field] = value
    for name, field in TEXT_COUNTS:
        if limit_texts is not None and name in changes:  # half of a probe's texts are of its class
            of_config = changes[name].get(field, getattr(CONFIGS[name](), field))
            changes[name][field] = min(of_config, 2 * limit_texts)
    build: dict[str, Callable[[Any], Evaluation[Any]]] = {
        "sparse_probing": lambda config: SparseProbing(config, data),
        "tpp": lambda config: ConceptErasure(config, data),
        "scr": lambda config: ConceptErasure(config, data),
        "sparse_probing_sae_probes": lambda config: _sae_probes().SaeProbes(config, limit_texts),
        "absorption": lambda config: Absorption(config, max_words),
        "core": lambda config: Core(
            config, follow_training="exclude_special_tokens_from_reconstruction" not in changes["core"]
        ),
        "meta_structure": MetaStructure,
    }
    return [build[name](_config(name, changed)) for name, changed in changes.items()]


def _config(name: str, changes: dict[str, Any]) -> Any:
    config_class = CONFIGS[name] if name in CONFIGS else _sae_probes().SparseProbingSaeProbesEvalConfig
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


def _sae_probes() -> Any:
    from sae_lens_matryoshka.bench import sae_probes

    return sae_probes


def _load_sae(where: str, widths: Sequence[int] | None, device: str, dtype: str) -> SAE[Any]:
    repository, colon, sae_id = where.partition(":")
    source, sae_id = (repository, sae_id) if colon and not os.path.exists(where) else (where, None)
    try:
        return load_any(source, sae_id, widths=widths, device=device, dtype=dtype)
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"{where} cannot be loaded: {error}") from error
