"""The SAEs of a run file: ``sae``, or ``saes`` by name on top of what a ``sae`` beside it gives to all of them.

A name becomes a folder, so it must be one on every system and stay inside the output folder.
"""

import re
import unicodedata
from collections import ChainMap
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from sae_lens_matryoshka.errors import ConfigError

SAEFields: TypeAlias = "ChainMap[str, Any]"
"""An SAE's fields in a run file: its own first, then those of the shared ``sae``."""

MAX_NAME_BYTES = 200
"""How long a name may be; file systems take 255 bytes, and names get additions."""

_FORBIDDEN_CHARACTERS = re.compile(r'[<>:"/\\|?*]')
_DEVICE_NAMES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
_FILE_SUFFIXES = (".json", ".csv", ".png", ".pt", ".safetensors", ".lock", ".partial")


def named_saes(run: Mapping[str, Any]) -> dict[str, SAEFields]:
    """The SAEs of a run file by name; a single one is called ``sae``.

    Args:
        run: A run file's contents.

    Raises:
        ConfigError: If there is none, an entry is not a mapping, a name cannot be a folder, two have the same name, or
            a field of the shared ``sae`` is one that every entry has of its own.
    """
    if "sae" not in run and "saes" not in run:
        raise ConfigError("The field 'sae' is missing: say which SAE to train (or 'saes' for several).")
    shared = run.get("sae", {})
    if not isinstance(shared, Mapping):
        raise ConfigError(f"sae={shared!r} must be a mapping of SAE config fields.")
    if "saes" not in run:
        return {"sae": ChainMap(dict(shared))}
    entries = _entries(run["saes"], shared)
    _check_names(name for name, _ in entries)
    for field in shared:
        if all(field in own for _, own in entries):
            raise ConfigError(
                f"sae.{field}={shared[field]!r} is used by none of saes, which all have a {field} of their own; set "
                f"saes.NAME.{field} for one of {', '.join(name for name, _ in entries)}."
            )
    return {name: ChainMap(own, dict(shared)) for name, own in entries}


def sae_name(own: Mapping[str, Any], shared: Mapping[str, Any]) -> str:
    """What an entry of a list of SAEs is called: its ``name``, or ``<architecture>_k<k>`` without one.

    Args:
        own: The entry.
        shared: The fields of the shared ``sae``.

    Raises:
        ConfigError: If ``name`` is neither text nor a whole number.
    """
    name = own.get("name", "")
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise ConfigError(f"name={name!r} in saes must be text; put it in quotes.")
    if "name" in own:
        return str(name)
    sae = {**shared, **own}
    suffix = f"_k{sae['k']}" if "k" in sae else ""
    return f"{sae.get('architecture')}{suffix}"


def _entries(saes: Any, shared: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Names and own fields of the entries of ``saes``, a mapping or a list."""
    if isinstance(saes, Mapping):
        for name in saes:
            if isinstance(name, bool) or not isinstance(name, str | int):
                raise ConfigError(f"The name {name!r} in saes must be text; put it in quotes.")
            if isinstance(name, int) and str(name) in saes:
                raise ConfigError(f"Two entries of saes are called {str(name)!r}; give them different names.")
        saes = {str(name): {} if own is None else own for name, own in saes.items()}
    entries = list(saes.values()) if isinstance(saes, Mapping) else saes
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, Mapping) for entry in entries):
        raise ConfigError(f"saes={saes!r} must be a list or mapping of SAE configs.")
    if isinstance(saes, Mapping):
        return [(name, dict(own)) for name, own in saes.items()]
    return [
        (sae_name(own, shared), {field: value for field, value in own.items() if field != "name"}) for own in entries
    ]


def _check_names(names: Iterable[str]) -> None:
    seen: dict[str, str] = {}
    for name in names:
        if reason := why_no_folder(name):
            raise ConfigError(
                f"The name {name!r} in saes cannot be that of a folder, since it {reason}; use letters, digits, '-' "
                f"and '_'."
            )
        folder = same_folder(name)
        if name == seen.get(folder):
            raise ConfigError(f"Two entries of saes are called {name!r}; give them different names with 'name'.")
        if folder in seen:
            raise ConfigError(f"The names {seen[folder]!r} and {name!r} in saes are the same folder on some systems.")
        seen[folder] = name


def same_folder(name: str) -> str:
    """What is equal for names that are one folder where case, or ways to write an accent, are not told apart."""
    return unicodedata.normalize("NFC", name).casefold()


def why_no_folder(name: str) -> str | None:
    """Why a name cannot be that of a new folder on every system, in a few words; None if it can."""
    if not name.strip():
        return "is empty"
    if found := _FORBIDDEN_CHARACTERS.search(name):
        return f"holds {found.group()!r}"
    if not name.isprintable():
        return "holds a character that cannot be printed"
    if name.startswith("."):
        return "begins with a dot"
    if name != name.strip() or name.endswith("."):
        return "begins or ends with a space or dot"
    if len(name.encode()) > MAX_NAME_BYTES:
        return f"is longer than {MAX_NAME_BYTES} bytes"
    if _DEVICE_NAMES.fullmatch(name):
        return "is a device on Windows"
    if name.lower().endswith(_FILE_SUFFIXES):
        return "ends like the files that will be beside it"
    return None
