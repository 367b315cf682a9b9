"""Hooks of mkdocs: pages of the repository's root, files that pages link outside docs/, and the API reference.

Named in `mkdocs.yml`; `make docs` builds the site. Which links there are is `site_links.py`'s; how docstrings become
HTML is mkdocstrings' work, and this file only says of which names and packages.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).resolve().parent))

from site_links import ROOT, ROOT_PAGES, for_site

PACKAGE = ROOT / "src/nanoflow"
# Packages whose docstrings are no reference: modules of other names, and data.
_LEFT_OUT = {"default_model"}


def on_files(files: Files, config: Any) -> Files:
    """Add pages from outside docs/, pages of the reference, and every file that some page links outside docs/.

    Raises:
        PluginError: A page links a file that is not there.
    """
    for place, source in ROOT_PAGES.items():
        files.append(File.generated(config, place, content=(ROOT / source).read_text(encoding="utf-8")))
    for place, text in reference_pages().items():
        files.append(File.generated(config, place, content=text))
    needed: dict[str, str] = {}
    for file in files.documentation_pages():
        needed |= for_site(file.content_string, source_of(file.src_uri))[1]
    for place, path in sorted(needed.items()):
        if not (ROOT / path).is_file():
            raise PluginError(f"a page links {path}, which is no file of the repository")
        files.append(File.generated(config, place, content=(ROOT / path).read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links to files outside docs/ lead to their copies in the site."""
    return for_site(markdown, source_of(page.file.src_uri))[0]


def source_of(place: str) -> str:
    """The path in the repository of a page of the site."""
    return ROOT_PAGES.get(place, f"docs/{place}")


def reference_pages() -> dict[str, str]:
    """Pages of the reference by their places: what `import nanoflow` has, and one page a package."""
    pages = {"reference/python.md": _public_page()}
    rows = ["| package | what it is |", "|---|---|", "| [nanoflow](python.md) | the names of `import nanoflow` |"]
    for folder in sorted(path.parent for path in PACKAGE.glob("*/__init__.py")):
        if folder.name not in _LEFT_OUT:
            place = f"reference/{folder.name}.md"
            pages[place] = f"# nanoflow.{folder.name}\n\n{_directive(f'nanoflow.{folder.name}', has_modules=True)}"
            rows.append(f"| [nanoflow.{folder.name}]({folder.name}.md) | {_summary(folder / '__init__.py')} |")
    modules = [path for path in sorted(PACKAGE.glob("*.py")) if path.stem not in ("__init__", "__main__")]
    parts = "\n\n".join(_directive(f"nanoflow.{path.stem}") for path in modules)
    pages["reference/modules.md"] = f"# Modules of the root\n\n{parts}"
    rows.append("| [modules of the root](modules.md) | requests, outputs, options, hardware and others |")
    table = "\n".join(rows)
    pages["reference/index.md"] = (
        "# Reference\n\nMade from docstrings. Programs that use nanoflow need the first page alone; the others are for "
        f"those who change it.\n\n{table}\n"
    )
    return pages


def _public_page() -> str:
    """The names in `nanoflow.__all__`, one after the other."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (names,) = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    parts = [_directive(f"nanoflow.{name}") for name in names if not name.startswith("_")]
    return "# nanoflow\n\nWhat `import nanoflow` has.\n\n" + "\n\n".join(parts)


def _directive(name: str, *, has_modules: bool = False) -> str:
    """What mkdocstrings replaces by the documentation of a name."""
    return f"::: {name}\n    options:\n      show_submodules: {str(has_modules).lower()}\n"


def _summary(path: Path) -> str:
    """The first line of a package's docstring."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.split("\n\n")[0].split()).replace("|", "\\|")
