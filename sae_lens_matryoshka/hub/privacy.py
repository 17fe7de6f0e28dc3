"""The one way from a folder to a repository: what is published of configs and tables is what comes out of here.

SAELens records ``model_name``, ``dataset_path`` and its whole runner config verbatim. A path is replaced by its last
part, which still says what was used; accounts, tokens and passwords are left out. Every replacement is reported.

Whether ``models/gemma`` is a path or a name on the Hub says what training has recorded (:mod:`trained_from`), wherever
the SAE is pushed from. For an SAE without that record it is a name on the Hub only if the user says so or a table knows
it (:func:`hub_names.is_known`), and there is no such path here; otherwise it is taken for a path.
"""

import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from sae_lens_matryoshka.errors import UserError
from sae_lens_matryoshka.hub.account_text import is_account, is_server, without_accounts
from sae_lens_matryoshka.hub.hub_names import HUB_NAME, is_known, official_model
from sae_lens_matryoshka.hub.local_paths import is_path, last_part, without_encoded_paths, without_paths
from sae_lens_matryoshka.hub.secret_text import decoded, is_secret, without_login
from sae_lens_matryoshka.saved.trained_from import LOCAL_PATHS, source_names


@dataclass(frozen=True)
class Replacement:
    """A value that is published otherwise than it stands on disk."""

    field: str
    """The file and the field in it, such as ``cfg.json: metadata.model_name``."""

    value: str
    """What stands on disk; tokens and passwords are not repeated here."""

    published: str | None
    """What is published instead; None for nothing."""

    guessed: bool = False
    """Whether it may be a name on the Hub, for all that is known, and has been taken for a path to be safe."""


class PrivacyFilter:
    """Takes from what is published of one SAE what says where and by whom it was made.

    Args:
        metadata: The SAE's metadata, as they stand on disk.
        hub_names: Names of models and data sets that are on the Hub, says the user.

    Raises:
        UserError: If one of ``hub_names`` is recorded as a path.
    """

    def __init__(self, metadata: dict[str, Any] | None = None, hub_names: Collection[str] = ()) -> None:
        self.replacements: list[Replacement] = []
        sources = source_names(metadata or {})
        recorded = (metadata or {}).get(LOCAL_PATHS)
        self._on_hub = set(hub_names)
        self._local: set[str] = set()
        if isinstance(recorded, list):
            self._local = {name for field, name in sources.items() if field in recorded}
            named = {name for field, name in sources.items() if _NAME_FIELD.fullmatch(field.rpartition(".")[2])}
            self._on_hub |= named - self._local
        for name in self._local & set(hub_names):
            raise UserError(f"{name!r} was a path when this SAE was trained, not a name on the Hub.")
        self.seen: set[str] = set()
        """The texts that have been published, for what the user says about one that is not there."""

    def contents(self, value: Any, field: str) -> Any:
        """A copy of JSON contents without paths, accounts and secrets.

        Args:
            value: The contents: objects, lists, strings, numbers.
            field: What replacements call them; nested fields are appended.
        """
        name = re.split(r"[.: ]", re.sub(r"(\[\d+\])+$", "", field))[-1]
        if is_secret(value, name, field):
            self.replacements.append(Replacement(field, "(a secret)", None))
            return None
        if is_account(value, name):
            is_plain = isinstance(value, str) and ":" not in value  # no password
            self.replacements.append(Replacement(field, value if is_plain else "(an account)", None))
            return None
        if isinstance(value, dict):
            separator = "" if field.endswith(": ") else "."
            keys = {key: "(a secret)" if is_secret(key, "") else _without_private_parts(key) for key in value}
            return {keys[key]: self.contents(inner, f"{field}{separator}{keys[key]}") for key, inner in value.items()}
        if isinstance(value, list):
            return [self.contents(inner, f"{field}[{index}]") for index, inner in enumerate(value)]
        if not isinstance(value, str):
            return value
        self.seen.add(value)
        published = self._published(value, name)
        if published != value:
            shown = without_login(value)
            if without_login(decoded(value)) != decoded(value) or (is_server(value, name) and "@" in value):
                shown = f"{published if shown == value else shown} (with a login)"
            self.replacements.append(Replacement(field, shown, published, self._is_guess(value, name)))
        return published

    def hub_model(self, model_name: str | None) -> str | None:
        """The Hub's name of a model, or None if it has none that is known; short names are looked up in a table."""
        if not model_name or self._is_local(model_name, "model_name") or not self._is_on_hub(model_name):
            return None
        return official_model(model_name) or (model_name if re.fullmatch(HUB_NAME, model_name) else None)

    def hub_dataset(self, dataset_path: str | None) -> str | None:
        """The Hub's name of a data set, or None if it has none that is known."""
        if not dataset_path or self._is_local(dataset_path, "dataset_path"):
            return None
        return dataset_path if re.fullmatch(HUB_NAME, dataset_path) else None

    def _published(self, value: str, field: str) -> str:
        """What is published of a string; ``field`` is the name of the field that holds it."""
        value = without_encoded_paths(value, _without_private_parts)
        if is_server(value, field):
            return "local"
        if self._is_local(value, field):
            return last_part(value)
        if value in self._on_hub or field == "revision":
            return value
        for path in sorted(self._local, key=len, reverse=True):
            if re.search(r"[/\\]", path):
                value = value.replace(path, last_part(path))
        return _without_private_parts(value)

    def _is_local(self, value: str, field: str) -> bool:
        """Whether a whole string is a path."""
        if is_path(value) or value in self._local:
            return True
        n_separators = len(re.findall(r"[/\\]", value))
        if n_separators == 0 or "://" in value or value in self._on_hub:
            return False
        if _NAME_FIELD.fullmatch(field):
            return not self._is_on_hub(value)
        if _PATH_FIELD.fullmatch(field):
            return True
        if os.path.exists(value):  # unlike Path.exists, also False for text that cannot be a path
            return True
        return n_separators > 1 and field != "revision" and re.fullmatch(r"\S*[^\W\d]\S*", value) is not None

    def _is_guess(self, value: str, field: str) -> bool:
        known = value in self._local or is_path(value) or os.path.exists(value)
        return not known and all(re.fullmatch(form, text) for form, text in ((HUB_NAME, value), (_NAME_FIELD, field)))

    def _is_on_hub(self, name: str) -> bool:
        return name in self._on_hub or (is_known(name) and not os.path.exists(name))


def _without_private_parts(text: str) -> str:
    return without_accounts(without_paths(without_login(text)))


_NAME_FIELD = re.compile(r"(?:\w+_)?(?:model|dataset|tokenizer|adapter|processor)(?:_name|_path|_id)?|\w*name_or_path")
_PATH_FIELD = re.compile(r"(?:\w*_)?(?:path|dir|directory|folder|file|root)s?|resume_from_checkpoint")
