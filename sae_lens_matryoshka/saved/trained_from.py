"""Which names of models and data sets were paths: only while an SAE is trained can that be told.

``models/gemma`` is a folder where there is one, and a name on the Hub everywhere else. So training records in an SAE's
metadata which of the names it recorded were paths, and publishing goes by that (:mod:`hub.privacy`).
"""

import os
from collections.abc import Iterable, Iterator
from typing import Any

from sae_lens import LanguageModelSAERunnerConfig, MultiSAETrainingRunnerConfig, TrainingSAE
from sae_lens.saes.sae import SAEMetadata

from sae_lens_matryoshka.errors import UserError

LOCAL_PATHS = "local_paths"
"""The field of an SAE's metadata that lists the fields of a run that named local files or folders."""

_FIELDS = ("model_name", "dataset_path", "model_from_pretrained_kwargs", "model_kwargs")


def record_local_paths(
    cfg: "LanguageModelSAERunnerConfig[Any] | MultiSAETrainingRunnerConfig", saes: Iterable[TrainingSAE[Any]]
) -> None:
    """Record in the metadata of SAEs which names of their run are paths.

    Call it before or while they are trained, in the working directory of the run.
    """
    named = source_names({field: getattr(cfg, field, None) for field in _FIELDS})
    local = [field for field, name in named.items() if os.path.exists(os.path.expanduser(name))]
    for sae in saes:
        sae.cfg.metadata[LOCAL_PATHS] = list(local)


def recorded_model(metadata: SAEMetadata) -> str | None:
    """The name or path of the model that an SAE was trained on, if it records one.

    Raises:
        UserError: If it was a path that is not here: on the Hub, its name would be somebody else's.
    """
    name = metadata.model_name
    if name and "model_name" in (metadata[LOCAL_PATHS] or ()) and not os.path.exists(os.path.expanduser(name)):
        raise UserError(f"The SAE was trained on {name!r}, a local model that is not here; name it with --model.")
    return name


def source_names(contents: dict[str, Any]) -> dict[str, str]:
    """What a run's config or an SAE's metadata names as the sources of its activations, by field.

    Fields of mappings in it are called ``mapping.field``.
    """
    return {field: name for part in _FIELDS for field, name in _texts(part, contents.get(part))}


def _texts(field: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, str) and value:
        yield field, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(f"{field}.{key}", inner)
