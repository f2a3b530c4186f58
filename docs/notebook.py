"""
Makes ``examples/get_started.ipynb`` of ``docs/get_started.md``: a cell for each block of Python, and for the text between.

    python docs/notebook.py
"""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE, NOTEBOOK = ROOT / "docs" / "get_started.md", ROOT / "examples" / "get_started.ipynb"


def cells(text: str) -> list[dict[str, Any]]:
    """
    :param text: of a page
    :return: its cells, in the notebook format
    """
    found: list[dict[str, Any]] = []
    # Text and code take turns
    for i, part in enumerate(re.split(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)):
        source = part.strip().splitlines(keepends=True)
        if i % 2:
            found.append({"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": [], "source": source})
        elif source:
            found.append({"cell_type": "markdown", "metadata": {}, "source": source})
    return [{"id": f"cell-{i}", **cell} for i, cell in enumerate(found)]


def notebook(text: str) -> dict[str, Any]:
    """
    :param text: of the page
    :return: the notebook
    """
    text = re.sub(r"^The same page as a notebook:.*\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"\]\((\w+\.md)\)", r"](../docs/\1)", text)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells(text), "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def main() -> None:
    text = json.dumps(notebook(PAGE.read_text(encoding="utf-8")), indent=1, ensure_ascii=False)
    NOTEBOOK.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
