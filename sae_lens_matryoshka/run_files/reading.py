"""From the name or path of a run file, and what the command line changes of it, to a plain dictionary."""

from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from sae_lens_matryoshka.errors import ConfigError
from sae_lens_matryoshka.run_files.settings import apply_setting, load_yaml, remove_field


def embedded_run_files() -> dict[str, Path]:
    """The run files that come with the package, by name."""
    package = Path(str(files("sae_lens_matryoshka")))
    # an installed package holds them, in a checkout they lie beside it
    folder = next(f for f in (package / "configs", package.parent / "configs") if f.is_dir())
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read_run_file(path_or_name: str | Path, settings: Iterable[str] = (), unset: Iterable[str] = ()) -> dict[str, Any]:
    """Read a run file, apply settings to it, and return it as a plain dictionary.

    Args:
        path_or_name: Path of a YAML file, or the name of one that comes with the package.
        settings: Changes as ``key.sub=value``, the value in YAML; an entry of ``saes`` goes by its name, in a list also
            by its index.
        unset: Fields to take out, as ``key.sub``, before the settings are applied.

    Raises:
        ConfigError: If there is no such file, it is not a YAML mapping, a field to take out is not there, or a setting
            cannot be applied.
    """
    path = Path(path_or_name)
    embedded = embedded_run_files()
    if not path.is_file():
        if str(path_or_name) not in embedded:
            raise ConfigError(
                f"There is no run file {str(path_or_name)!r}; give the path of a YAML file or one of the embedded "
                f"names {', '.join(embedded)}."
            )
        path = embedded[str(path_or_name)]
    try:
        run = load_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(run, dict):
        raise ConfigError(f"{path} must hold a mapping of SAELens runner fields to values, not {type(run).__name__}.")
    for key in unset:
        remove_field(run, key)
    for setting in settings:
        apply_setting(run, setting)
    return run
