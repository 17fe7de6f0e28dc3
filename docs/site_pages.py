"""Which pages the documentation's site has, for mkdocs: nothing is written twice.

The site mirrors the repository: its Markdown files stand where they stand, so that the links among them hold on the
site and on GitHub alike, and links to other files lead to the repository. Each name that a public module exports in
``__all__`` has a page, made from its docstring.
"""

import ast
import re
from pathlib import Path
from posixpath import dirname, join, normpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {
    "Guide": "README.md",
    "Variants": "docs/variants.md",
    "Activations of real models": "docs/activations.md",
    "Evaluating": "docs/evaluating.md",
    "Gemma 3 270M": "docs/gemma-3-270m.md",
    "Gemma's latents": "docs/gemma-3-270m-latents.md",
    "Results on TinyStories": "docs/saebench_tinystories.md",
    "Activation caches": "docs/activation-cache.md",
    "Benchmarks": "benchmarks/README.md",
    "Promises": "docs/promises.md",
    "SAELens extension points": "entry_points.md",
    "Changelog": "CHANGELOG.md",
}
MODULES = ("sae_lens_matryoshka", "sae_lens_matryoshka.hub", "sae_lens_matryoshka.bench")
# what public names inherit and their docstrings refer to
SHARED = ("sae_lens_matryoshka.saes.nested_training_config.NestedTrainingSAEConfig",)


def public_names(module: str) -> list[str]:
    """What a module exports, read without importing it: ``bench`` needs packages that the site does not."""
    tree = ast.parse((ROOT / module.replace(".", "/") / "__init__.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    raise ValueError(f"{module} has no __all__")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List the pages in the navigation."""
    reference = [{module: [_page(module, name) for name in ["index", *public_names(module)]]} for module in MODULES]
    shared = [{"Shared by the variants": [_page(*name.rsplit(".", 1)) for name in SHARED]}]
    config.nav = [{title: path} for title, path in PAGES.items()] + [{"API": [*reference, *shared]}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Put the repository's files at their own paths, and the pages of the public names beside them."""
    for file in list(files):
        if file.src_dir == config.docs_dir:
            files.remove(file)
    figures = [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("docs/*.png"))]
    for path in [*PAGES.values(), *figures]:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    for module in MODULES:
        links = "\n".join(f"- [`{name}`][{module}.{name}]" for name in public_names(module))
        content = f"::: {module}\n    options:\n      members: false\n\n{links}\n"
        files.append(File.generated(config, _page(module, "index"), content=content))
    for name in [*(f"{module}.{name}" for module in MODULES for name in public_names(module)), *SHARED]:
        files.append(File.generated(config, _page(*name.rsplit(".", 1)), content=f"::: {name}\n"))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links to files that are no part of the site lead to the repository."""

    def lead(match: re.Match[str]) -> str:
        path = normpath(join(dirname(page.file.src_uri), match.group(1)))
        if files.get_file_from_path(path) is not None or not (ROOT / path).exists():
            return match.group()
        return f"]({config.repo_url}/blob/main/{path})"

    return re.sub(r"\]\((?!https?:|#)([^)#]+)\)", lead, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Show what docstrings mark as ``:func:`name``` as a name."""
    return re.sub(r":(?:attr|class|data|func|meth|mod):(?=<code>)", "", html)


def _page(module: str, name: str) -> str:
    return f"api/{module}/{name}.md"
