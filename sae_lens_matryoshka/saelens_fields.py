"""The fields of SAELens's configs, their types and defaults, without SAELens where it has not been imported.

Importing SAELens takes ten seconds, and telling that a key is misspelt should not. So the fields are also in a table,
``saelens_fields_table.py``, which this module writes (``python -m sae_lens_matryoshka.saelens_fields``) and a test
compares with SAELens. It is read only while SAELens is not imported; the command line imports SAELens at once where it
is another version than the table's.
"""

import dataclasses
import sys
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from importlib.metadata import version
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

RUN_CONFIGS = (
    "LanguageModelSAERunnerConfig", "MultiSAETrainingRunnerConfig", "SyntheticSAERunnerConfig", "SyntheticModelConfig",
    "LoggingConfig",
)  # fmt: skip
"""SAELens's configs whose fields stand in run files, beside those of SAEs."""


class _Mark(Enum):
    REQUIRED = 1
    OBJECT = 2

    def __repr__(self) -> str:
        return self.name


REQUIRED: Any = _Mark.REQUIRED
"""The default of a field that has none."""

OBJECT: Any = _Mark.OBJECT
"""The type, or the default, of a field that is an object of SAELens's or is made anew each time."""


class Nested(NamedTuple):
    """The type of a field that is a config of its own, which a mapping can fill."""

    config: str
    """The name of its class."""


class ConfigField(NamedTuple):
    """One field of a config."""

    type: Any
    """A type hint of plain YAML values, :class:`Nested` or OBJECT."""

    default: Any = REQUIRED
    """Its default, REQUIRED or OBJECT."""


Fields = Mapping[str, ConfigField]


class Tables(NamedTuple):
    """All configs that run files and saved SAEs are checked against, by the name of the class or architecture."""

    configs: Mapping[str, Fields]
    """Configs of runs, and the configs nested in them, by the name of the class."""

    training: Mapping[str, Fields]
    """Configs of SAEs in training, by architecture."""

    saved: Mapping[str, Fields]
    """Configs of SAEs for inference, by architecture."""


def tables() -> Tables:
    """The fields of all configs: of SAELens where it is imported, else from the table."""
    if "sae_lens" in sys.modules:
        return _tables_of_saelens()
    from sae_lens_matryoshka import saelens_fields_table as table

    return Tables(table.CONFIGS, table.TRAINING, table.SAVED)


def table_is_current() -> bool:
    """Whether the table is of the SAELens that is installed; else import SAELens before anything is checked."""
    from sae_lens_matryoshka.saelens_fields_table import SAELENS_VERSION

    return version("sae-lens") == SAELENS_VERSION


def _config_fields(config_class: type) -> dict[str, ConfigField]:
    """The fields of a config that one may give."""
    hints = get_type_hints(config_class)
    return {
        f.name: ConfigField(_field_type(hints[f.name]), _default(f))
        for f in dataclasses.fields(config_class)
        if f.init and not f.name.startswith("_")
    }


def _tables_of_saelens() -> Tables:
    import sae_lens
    from sae_lens import synthetic
    from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

    runs = [getattr(sae_lens, name, None) or getattr(synthetic, name) for name in RUN_CONFIGS]
    return Tables(
        {config.__name__: _config_fields(config) for config in _with_nested(runs)},
        {name: _config_fields(config) for name, (_, config) in SAE_TRAINING_CLASS_REGISTRY.items()},
        {name: _config_fields(config) for name, (_, config) in SAE_CLASS_REGISTRY.items()},
    )


def _with_nested(configs: Iterable[type]) -> Iterator[type]:
    for config in configs:
        yield config
        yield from _with_nested(filter(None, map(_nested_config, get_type_hints(config).values())))


def _field_type(hint: Any) -> Any:
    nested = _nested_config(hint)
    if nested is not None:
        return Nested(nested.__name__)
    return hint if _is_plain(hint) else OBJECT


def _nested_config(hint: Any) -> type | None:
    """The dataclass in a hint such as ``HierarchyConfig | None``, if it is one that a mapping can fill."""
    for candidate in (hint, *get_args(hint)):
        if (
            isinstance(candidate, type)
            and dataclasses.is_dataclass(candidate)
            and not getattr(candidate, "__abstractmethods__", None)
            and candidate.__name__ not in RUN_CONFIGS
        ):
            return candidate
    return None


def _is_plain(hint: Any) -> bool:
    """Whether a hint speaks of plain YAML values only."""
    if hint in (Any, None, type(None), Ellipsis) or isinstance(hint, (str, int, bool)):  # the latter: Literal's values
        return True
    arguments = get_args(hint)
    return all(map(_is_plain, arguments)) if arguments else hint in (bool, int, float, str, dict, list, tuple)


def _default(field: "dataclasses.Field[Any]") -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return OBJECT
    if field.default is dataclasses.MISSING:
        return REQUIRED
    is_plain = field.default is None or isinstance(field.default, (bool, int, float, str, tuple))
    return field.default if is_plain else OBJECT


def table_text() -> str:
    """The table as a Python file, of SAELens as it is installed."""
    lines = [
        '"""SAELens\'s configs in one version; written by ``python -m sae_lens_matryoshka.saelens_fields``."""',
        "",
        "from collections.abc import Mapping",
        "from typing import Any, Literal",
        "",
        "from sae_lens_matryoshka.saelens_fields import OBJECT, ConfigField, Nested",
        "",
        f'SAELENS_VERSION = "{version("sae-lens")}"',
    ]
    for name, configs in _tables_of_saelens()._asdict().items():
        lines += ["", f"{name.upper()}: dict[str, dict[str, ConfigField]] = {{"]
        for config, fields in configs.items():
            lines += [f'    "{config}": {{']
            lines += [f'        "{field}": {_field_text(value)},' for field, value in fields.items()]
            lines += ["    },"]
        lines += ["}"]
    return "\n".join(lines) + "\n"


def _field_text(field: ConfigField) -> str:
    kind = f'Nested("{field.type.config}")' if isinstance(field.type, Nested) else _hint_text(field.type)
    default = "" if field.default is REQUIRED else f", {field.default!r}".replace("'", '"')
    return f"ConfigField({kind}{default})"


def _hint_text(hint: Any) -> str:
    if hint is type(None):
        return "None"
    if get_origin(hint) is Literal:
        return f"Literal[{', '.join(map(repr, get_args(hint)))}]".replace("'", '"')
    if isinstance(hint, type) and not get_args(hint):
        return hint.__name__
    if get_args(hint) and get_origin(hint) in (dict, list, tuple, Mapping):
        arguments = ", ".join("..." if a is Ellipsis else _hint_text(a) for a in get_args(hint))
        return f"{get_origin(hint).__name__}[{arguments}]"  # type: ignore[union-attr]
    if get_args(hint):  # a union, in whichever of its two forms
        return " | ".join(map(_hint_text, get_args(hint)))
    return "Any" if hint is Any else repr(hint)


if __name__ == "__main__":
    from pathlib import Path

    Path(__file__).with_name("saelens_fields_table.py").write_text(table_text(), encoding="utf-8")
