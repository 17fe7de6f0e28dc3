"""The folders of the package are layers: what is in one uses what is below, and no two use each other."""

import ast
import re
from pathlib import Path

import sae_lens_matryoshka

PACKAGE = Path(sae_lens_matryoshka.__file__).parent
LAYERS = [
    ["errors", "command_line_start"],
    [
        "untrusted",
        "saelens_fields",
        "saelens_fields_table",
        "levels",
        "devices",
        "model_folders",
        "normalization",
        "replaced_fields",
    ],
    ["run_files", "saved", "ops"],
    ["text", "activation_cache"],
    ["saes"],
    ["registration", "measuring", "in_model"],
    ["training", "hub", "bench"],
    ["__init__"],
    ["cli"],
    ["__main__"],
]
"""From the bottom up. Within a layer no folder uses another, but for the table that is of its reader's types."""

LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
LONGEST_FILE = 350
GENERATED = {"saelens_fields_table.py"}


def _imports() -> dict[str, set[str]]:
    """What each module imports of this package, anywhere in its code."""
    imports: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        imports[module] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith(PACKAGE.name):
                continue
            inside = (node.module or "")[len(PACKAGE.name) :].strip(".")
            names = [f"{inside}.{alias.name}".strip(".") for alias in node.names]
            imports[module] |= {n if _is_module(n) else inside or "__init__" for n in names}
    return imports


def _is_module(name: str) -> bool:
    path = PACKAGE.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def test_nothing_is_imported_upwards():
    for module, imported in _imports().items():
        folder = module.split(".")[0]
        for other in {name.split(".")[0] for name in imported} - {folder}:
            assert LEVEL[other] < LEVEL[folder] or {folder, other} == {"saelens_fields", "saelens_fields_table"}, (
                f"{module} imports {other}"
            )


def test_no_modules_import_each_other():
    found = _imports()
    imports = {module: {n if n in found else f"{n}.__init__" for n in imported} for module, imported in found.items()}
    imports["saelens_fields"] = set()  # which reads the table that is made of its types, when it is asked
    done: set[str] = set()

    def follow(module: str, way: list[str]) -> None:
        assert module not in way, " -> ".join([*way[way.index(module) :], module])
        if module in done:
            return
        for other in imports.get(module, ()):
            follow(other, [*way, module])
        done.add(module)

    for module in imports:
        follow(module, [])


def test_files_are_short_enough_to_hold_in_mind():
    for path in PACKAGE.rglob("*.py"):
        if path.name not in GENERATED:
            assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE, path


def test_the_files_that_entry_points_names_are_there():
    text = (PACKAGE.parent / "entry_points.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z_/]+\.py)`", text)) | {f"{name}/" for name in re.findall(r"`([a-z_]+)/`", text)}
    assert len(named) > 20
    assert not [
        name
        for name in named
        if not (any((folder / name).exists() for folder in (PACKAGE, PACKAGE / "bench", PACKAGE.parent)))
    ]
