# SPDX-License-Identifier: Apache-2.0
"""What the site adds to the Markdown: the support table; links that leave docs/ stay readable without a repository."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
TABLE = "<!-- support table -->"
_LINK = re.compile(r"\[([^\]]+)\]\((?!\w+:)([^)#\s]+)[^)]*\)")


def support_table() -> str:
    """The table of README.md, from the kernel manifests."""
    spec = importlib.util.spec_from_file_location("support_table", DOCS / "support_table.py")
    if spec is None or spec.loader is None:
        raise ImportError("docs/support_table.py cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rendered: str = module.render()
    return rendered


def without_outer_links(markdown: str, folder: Path) -> str:
    """Links to files of the repository that lie outside docs/ become their paths, which the site does not serve."""

    def replace(match: re.Match[str]) -> str:
        text, target = match[1], (folder / match[2]).resolve()
        if target.is_relative_to(DOCS) or not target.is_relative_to(DOCS.parent):
            return match[0]
        path = target.relative_to(DOCS.parent).as_posix()
        return f"`{path}`" if text in (path, target.name) else f"{text} (`{path}`)"

    return _LINK.sub(replace, markdown)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by MkDocs for every page."""
    folder = Path(page.file.abs_src_path).parent
    return without_outer_links(markdown.replace(TABLE, support_table()), folder)
