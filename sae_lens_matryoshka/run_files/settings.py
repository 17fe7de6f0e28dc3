"""A run file's YAML, and changing fields of it from the command line: ``--set`` and ``--unset``."""

import re
from typing import Any

import yaml
from yaml.composer import ComposerError

from sae_lens_matryoshka.errors import ConfigError
from sae_lens_matryoshka.run_files.saes import sae_name
from sae_lens_matryoshka.untrusted import bounded


def load_yaml(text: str) -> Any:
    """The contents of a run file, or the value of a setting.

    Raises:
        yaml.YAMLError: If it is not valid YAML, unfolds into too much, or gives a field twice.
    """
    return bounded.load_yaml(text, _Loader)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, except that 3e-4 is a number, as in YAML 1.2 and Python, and for keys.

    Keys are the names of fields and SAEs, so they are text as it is written: in ``saes: {1: ...}`` it is "1". A key
    that stands twice in a mapping is an error, as YAML has it: one of the two values would go unused.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        written: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in written:
                    raise ComposerError(None, None, f"{key.value!r} is given twice", key.start_mark)
                written.add(key.value)
                key.tag = "tag:yaml.org,2002:str"
        return node


# whole numbers as in YAML 1.2: to 1.1, 010 is 8 and 1:30 is 90
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NUMBERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][\d_]*|0x[\da-fA-F]+)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.\d*|\.\d+)$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+.0123456789"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*\.?|\d*\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def apply_setting(run: dict[str, Any], setting: str) -> None:
    """Set a field of a run file's contents, in place.

    Args:
        run: The contents.
        setting: ``key.sub=value``, the value in YAML. An entry of ``saes`` goes by its name, in a list also by its
            index.

    Raises:
        ConfigError: If the setting has another form, or reaches into what is not there.
    """
    key, separator, text = setting.partition("=")
    if not separator or not key:
        raise ConfigError(f"The setting {setting!r} is not of the form key.sub=value, for example lr=3e-4 or sae.k=40.")
    try:
        value = load_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"The value of the setting {setting!r} is not valid YAML; quote it.") from error
    container, last = _locate(run, key, f"The setting {setting!r}", make_missing=True)
    container[last] = value


def remove_field(run: dict[str, Any], key: str) -> None:
    """Take a field out of a run file's contents, in place.

    Args:
        run: The contents.
        key: The field as ``key.sub``, as in :func:`apply_setting`.

    Raises:
        ConfigError: If there is no such field.
    """
    container, last = _locate(run, key, f"--unset {key}", make_missing=False)
    del container[last]


def _locate(run: dict[str, Any], key: str, request: str, make_missing: bool) -> tuple[Any, Any]:
    """The mapping or list that holds a field, and the field's key or index there.

    With ``make_missing`` the field may be missing, and mappings on the way to it are made. Errors name the ``request``.
    """
    target: Any = run
    passed: list[str] = []
    while True:
        names = _entry_names(target, run)
        part, key = _split(key, names)
        step: Any = part
        if isinstance(target, list):
            step = _list_index(part, names, len(target), request)
        elif not isinstance(target, dict):
            raise ConfigError(f"{request} reaches into {'.'.join(passed)}, a plain value.")
        elif part not in target and not make_missing:
            raise ConfigError(f"{request}: there is no such field to take out; there are {', '.join(names) or 'none'}.")
        elif part not in target and key and target is run.get("saes"):
            raise ConfigError(f"{request}: saes has no {part!r}; it has {', '.join(names)}.")
        if not key:
            return target, step
        passed.append(part)
        if make_missing and isinstance(target, dict) and target.get(step) is None:  # `logger:` with nothing after it
            target[step] = {}
        target = target[step]


def _entry_names(target: Any, run: dict[str, Any]) -> list[str]:
    """What the entries of a mapping, or of the list of SAEs, are called."""
    if isinstance(target, dict):
        return [str(name) for name in target]
    shared = run.get("sae") or {}
    if target is run.get("saes") and all(isinstance(sae, dict) for sae in (shared, *target)):
        return [sae_name(own, shared) for own in target]
    return []


def _split(key: str, names: list[str]) -> tuple[str, str]:
    """The first part of ``key.sub`` and the rest; a name with dots in it, such as ``batchtopk_k2.5``, is one part."""
    with_dots = [name for name in names if "." in name and f"{key}.".startswith(f"{name}.")]
    part = max(with_dots, key=len, default=key.partition(".")[0])
    return part, key[len(part) + 1 :]


def _list_index(part: str, names: list[str], n_entries: int, request: str) -> int:
    if part in names:
        return names.index(part)
    if not bounded.is_whole_number(part) or int(part) >= n_entries:
        or_name = f" or a name ({', '.join(names)})" if names else ""
        raise ConfigError(f"{request} needs an index from 0 to {n_entries - 1}{or_name} in place of {part!r}.")
    return int(part)
