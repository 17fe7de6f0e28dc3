"""Keeping this machine out of what is published: local paths, account names and tokens in configs.

SAELens records ``model_name``, ``dataset_path`` and its whole runner config verbatim. A local path is replaced by its
last part, which still says what was used; accounts and tokens are dropped. Every replacement is reported.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any


@dataclass(frozen=True)
class Replacement:
    """A value that is published otherwise than it stands on disk."""

    field: str
    """The file and the field in it, such as ``cfg.json: metadata.model_name``."""

    value: str
    """What stands on disk; a token is not repeated here."""

    published: str | None
    """What is published instead; None for nothing."""


def without_local_paths(value: Any, field: str, replacements: list[Replacement]) -> Any:
    """A copy of JSON contents that names no local path, account or token.

    Args:
        value: The contents: objects, lists, strings, numbers.
        field: What replacements call them; nested fields are appended.
        replacements: Takes a record of everything that was replaced.
    """
    if isinstance(value, dict):
        separator = "" if field.endswith(": ") else "."
        return {
            _clean_text(key): without_local_paths(inner, f"{field}{separator}{_clean_text(key)}", replacements)
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [without_local_paths(inner, f"{field}[{index}]", replacements) for index, inner in enumerate(value)]
    if not isinstance(value, str):
        return value
    name = re.split(r"[.: ]", field)[-1]
    if value and (name in _PRIVATE_FIELDS or _HUB_TOKEN.search(value)):
        hide = name not in _ACCOUNT_FIELDS
        replacements.append(Replacement(field, "(a token)" if hide else value, None))
        return None
    published = last_part(value) if is_local_path(value, name) else _clean_text(value)
    if published != value:
        replacements.append(Replacement(field, value, published))
    return published


def is_local_path(value: str, field: str = "") -> bool:
    """Whether a string names a file or folder of this or another machine, rather than something on the Hub.

    Args:
        value: The string.
        field: The name of the field that holds it; those of output folders hold nothing but local paths.
    """
    if "\n" in value or not value.strip():
        return False
    if value.lower().startswith("file:"):
        return True
    if "://" in value:
        return False
    if PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute() or value.startswith("\\\\"):
        return True
    if re.match(r"(\.{1,2}|~[^/\\]*)([/\\]|$)", value):
        return True
    n_separators = len(re.findall(r"[/\\]", value))
    if field in _OUTPUT_FIELDS:
        return n_separators > 0
    if n_separators == 0:
        return False
    if field in _NAME_FIELDS and ("\\" in value or n_separators > 1):  # names on the Hub have one slash at most
        return True
    return os.path.exists(value)  # unlike Path.exists, also False for text that cannot be a path


def last_part(path: str) -> str:
    """The last part of a local path, or ``local`` where that would tell who someone is."""
    parts = [part for part in re.split(r"[/\\]", path) if part not in ("", ".", "..")]
    if not parts or parts[-1].startswith("~") or parts[-1].endswith(":"):
        return "local"
    is_home = (len(parts) == 2 and parts[0].lower() in ("home", "users")) or parts[-1] == Path.home().name
    is_home |= len(parts) == 3 and parts[0].endswith(":") and parts[1].lower() == "users"
    return "local" if is_home else parts[-1]


def _clean_text(text: str) -> str:
    """Replace local paths inside a longer text, such as a command line."""
    return _EMBEDDED_PATH.sub(lambda match: last_part(match.group()), text)


_ACCOUNT_FIELDS = ("wandb_entity",)
_PRIVATE_FIELDS = (*_ACCOUNT_FIELDS, "token", "use_auth_token", "hf_token", "api_key")
_OUTPUT_FIELDS = (
    "output_path",
    "checkpoint_path",
    "cached_activations_path",
    "resume_from_checkpoint",
    "from_pretrained_path",
)
_NAME_FIELDS = ("model_name", "dataset_path")
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
_EMBEDDED_PATH = re.compile(
    r"""file:/+[^\s"']+ # a file URL
    | (?<![\w./\\-])~?/(?!/)(?:[^/\s"'<>|]+/)+[^/\s"'<>|]* # /at/least/two or ~/one
    | (?<![\w./\\-])~/[^\s"'<>|]+
    | (?<!\w)[A-Za-z]:\\[^\s"'<>|]+ # C:\...
    | \\\\[^\s"'<>|\\]+\\[^\s"'<>|]+ # \\server\share""",
    re.VERBOSE,
)
