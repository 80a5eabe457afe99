# SPDX-License-Identifier: Apache-2.0
"""The documentation site: its pages exist, its support table is the README's, it knows every reason of a refusal."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[3]
DOCS = ROOT / "docs"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def navigation() -> list[str]:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    return re.findall(r"^ +- .*: (\S+\.md)$", text[text.index("\nnav:") :], re.MULTILINE)


def test_every_page_is_in_the_navigation_and_exists() -> None:
    pages = navigation()
    assert len(pages) == len(set(pages)) >= 9
    assert sorted(pages) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def test_the_sites_support_table_is_the_readmes() -> None:
    hooks, table = load("mkdocs_hooks"), load("support_table")
    page = (DOCS / "support.md").read_text(encoding="utf-8")
    assert page.count(hooks.TABLE) == 1
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = readme[readme.index(table.BEGIN) + len(table.BEGIN) : readme.index(table.END)]
    assert hooks.support_table().strip() == shown.strip()


def test_links_out_of_the_site_become_paths() -> None:
    outside = load("mkdocs_hooks").without_outer_links
    here = DOCS / "performance"
    assert outside("a [x](../numerics.md#y) b", here) == "a [x](../numerics.md#y) b"
    assert outside("[x](https://example.org/y)", here) == "[x](https://example.org/y)"
    assert outside("see [results](../../README.md).", here) == "see results (`README.md`)."
    assert outside("[README.md](../../README.md)", here) == "`README.md`"


def test_every_code_of_a_refusal_is_explained() -> None:
    source = (ROOT / "host/constraints.cc").read_text(encoding="utf-8")
    flags = re.findall(r'^    \{"(\w+)", "', source, re.MULTILINE)
    others = re.findall(r'(?:return|push_back\() ?\{"(\w+)",', source)
    assert len(flags) >= 10
    assert len(others) >= 8
    page = (DOCS / "why-refused.md").read_text(encoding="utf-8")
    missing = [code for code in {*flags, *others} - {"flags"} if f"`{code}`" not in page]
    assert not missing, f"docs/why-refused.md does not explain {missing}"


def test_the_documentations_requirements_are_one_line() -> None:
    """The Makefile installs them without the package, reading that line."""
    lines = re.findall(r"^docs = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(lines) == 1
    assert "mkdocs-material" in lines[0]
