"""Names of models and data sets on the Hub, as far as tables know them without asking it."""

from functools import cache

import yaml
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from transformer_lens.loading_from_pretrained import get_official_model_name

from sae_lens_matryoshka.run_files.reading import embedded_run_files

HUB_NAME = r"[\w-][\w.-]*/[\w-][\w.-]*"
"""The form of ``user/name``; a relative path of two parts has it too."""


def official_model(name: str) -> str | None:
    """The Hub's name of a model that TransformerLens knows, also by a short name such as ``gemma-2-2b``."""
    try:
        return get_official_model_name(name)
    except ValueError:
        return None


def is_known(name: str) -> bool:
    """Whether TransformerLens's table, SAELens's directory of SAEs or a run file of this package has the name."""
    return name in _known_names() or official_model(name) is not None


@cache
def _known_names() -> frozenset[str]:
    names: set[str] = set()
    for release in get_pretrained_saes_directory().values():
        overrides = release.config_overrides or {}
        names |= {release.model, *(value for value in overrides.values() if isinstance(value, str))}
    for path in embedded_run_files().values():
        run = yaml.safe_load(path.read_text(encoding="utf-8"))
        names |= {run[field] for field in ("model_name", "dataset_path") if field in run}
    return frozenset(names)
