"""Names on the Hub of what an SAE was trained on, for the front matter of its card."""

import re
from collections.abc import Iterable

from transformer_lens.loading_from_pretrained import get_official_model_name

from sae_lens_matryoshka.hub.local_paths import Replacement


def hub_model(model_name: str | None, replacements: Iterable[Replacement]) -> str | None:
    """The Hub's name of a model, or None if it has none that is known.

    TransformerLens's short names, such as ``gemma-2-2b``, are looked up in its table.

    Args:
        model_name: ``model_name`` of the SAE's metadata.
        replacements: What was replaced in them; a local model has no name on the Hub.
    """
    if not model_name or _was_local(model_name, "model_name", replacements):
        return None
    try:
        return get_official_model_name(model_name)
    except ValueError:
        return model_name if re.fullmatch(_HUB_NAME, model_name) else None


def hub_dataset(dataset_path: str | None, replacements: Iterable[Replacement]) -> str | None:
    """The Hub's name of a data set, or None if it has none.

    Args:
        dataset_path: ``dataset_path`` of the SAE's metadata.
        replacements: What was replaced in them; a local data set has no name on the Hub.
    """
    if not dataset_path or _was_local(dataset_path, "dataset_path", replacements):
        return None
    return dataset_path if re.fullmatch(_HUB_NAME, dataset_path) else None


_HUB_NAME = r"[\w-][\w.-]*/[\w-][\w.-]*"


def _was_local(published: str, field: str, replacements: Iterable[Replacement]) -> bool:
    return any(replacement.field.endswith(field) and replacement.published == published for replacement in replacements)
