"""Files from somebody else: what they hold is bounded, and looked at, before anything is made of it."""

import json
import re
from typing import Any

import yaml

MAX_VALUES = 100_000
MAX_DEPTH = 100


def load_yaml(text: str, loader_class: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """The contents of a YAML text, bounded as they unfold: an alias costs what it stands for, each time.

    Raises:
        yaml.YAMLError: If it is not valid YAML, or unfolds into too much.
    """
    loader = loader_class(text)
    try:
        node = loader.get_single_node()
        check_bounded(node)  # before anything is made of it: merging keys unfolds too
        return None if node is None else loader.construct_document(node)
    except (ValueError, RecursionError) as error:  # as of PyYAML for a date that there cannot be
        raise yaml.YAMLError(str(error)) from error
    finally:
        loader.dispose()


def load_json(text: str) -> Any:
    """The contents of a JSON text; deep nesting is a ValueError as other bad JSON is.

    Raises:
        ValueError: If it is not valid JSON, or nested too deeply for Python.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def check_bounded(contents: Any) -> None:
    """Refuse mappings and lists that are nested too deeply, hold themselves, or hold too many values.

    Args:
        contents: What was read, or PyYAML's nodes of it; an object that stands in it twice counts twice.

    Raises:
        ValueError: If it is too much.
    """
    sizes: dict[int, int] = {}

    def size(value: Any, depth: int) -> int:
        value = value.value if isinstance(value, yaml.CollectionNode) else value
        if not isinstance(value, (dict, list, tuple)):
            return 1
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
        if id(value) not in sizes:
            inner = value.values() if isinstance(value, dict) else value
            sizes[id(value)] = 1 + sum(size(part, depth + 1) for part in inner)
        if sizes[id(value)] > MAX_VALUES:
            raise ValueError(f"it unfolds into more than {MAX_VALUES:,} values")
        return sizes[id(value)]

    size(contents, 0)


def is_whole_number(text: str) -> bool:
    """Whether a text is a whole number, in digits that ``int`` takes too: ``"²".isdigit()`` is true."""
    return re.fullmatch(r"[0-9]{1,18}", text) is not None


def is_number(text: str) -> bool:
    """Whether a text is a number, or says that there is none."""
    try:
        float(text)
    except ValueError:
        return False
    return len(text) <= 40
