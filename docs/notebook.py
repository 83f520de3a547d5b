"""Execute `docs/tutorial.py` as the notebook `docs/examples/tutorial.ipynb`: `python docs/notebook.py`, extra `docs`."""

from __future__ import annotations

import os
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

DOCS = Path(__file__).parent
NOTEBOOK = DOCS / "examples" / "tutorial.ipynb"


def main() -> None:
    """Execute all cells and write the notebook; an error in a cell is raised."""
    os.environ.setdefault("PLOTLY_RENDERER", "png")  # shown wherever a notebook is, and small
    notebook = jupytext.read(DOCS / "tutorial.py")
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i}"  # a random one would change with every run
        cell.metadata = {}
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
