"""Settings of the documentation site: ``make docs`` builds it, warnings are errors."""

import os
import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # autodoc reads this checkout, installed or not

project = "sb3_sdac"
author = "sb3_sdac contributors"
copyright = author
release = version = (ROOT / "sb3_sdac" / "version.txt").read_text(encoding="utf-8").strip()

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
suppress_warnings = ["misc.highlighting_failure"]

# Anchors of headings, as GitHub makes them
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_preserve_defaults = True
html_theme = "furo"
html_title = f"sb3_sdac {release}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]

#: Where files outside ``docs`` are shown, for instance https://host/owner/sb3_sdac/blob/main; by default they are downloads
FILES_URL = os.environ.get("SB3_SDAC_FILES_URL", "").rstrip("/")
_OUTSIDE = re.compile(r"(?<!!)\[([^\]]+)\]\(\.\./([^)#\s]+)(#[^)\s]+)?\)")


def _link_outside(app: Sphinx, docname: str, source: list[str]) -> None:
    """On GitHub ``../`` leads out of ``docs``. The site has only that folder, so there a link to another one is its name."""

    def replace(match: re.Match[str]) -> str:
        text, path, anchor = match.groups()
        if FILES_URL:
            return f"[{text}]({FILES_URL}/{path}{anchor or ''})"
        return text if (ROOT / path).is_dir() or path.endswith(".md") else match[0]

    source[0] = _OUTSIDE.sub(replace, source[0])


def _escape(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Docstrings are written to be read in an editor, too: |x| is no substitution there, and *shape no emphasis."""
    for i, line in enumerate(lines):
        parts = re.split(r"(``.*?``)", line)  # every second one is a literal
        parts[::2] = [re.sub(r"\||\*(?=\w)(?![^*]*\w\*)", r"\\\g<0>", part) for part in parts[::2]]
        lines[i] = "".join(parts)


def setup(app: Sphinx) -> None:
    """:param app: the builder"""
    app.connect("source-read", _link_outside)
    app.connect("autodoc-process-docstring", _escape)
