"""Executes the notebooks of docs/notebooks/ where they lie, and keeps their outputs; all of them, or those named.

    .venv-notebooks/bin/python experiments/notebooks.py [NAME ...]

`make test-notebooks` makes that environment, and executes them too, with small settings and nothing kept.
"""

import sys
from pathlib import Path
from typing import Any

import nbclient
import nbformat

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "notebooks"


def execute(name: str, **parameters: Any) -> nbformat.NotebookNode:
    """The notebook FOLDER/NAME.ipynb with its outputs; `parameters` replace values of its cell of parameters."""
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    if parameters:
        (place,) = [n for n, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ())]
        values = "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
        notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(values))
    where = {"metadata": {"path": str(FOLDER)}}
    client = nbclient.NotebookClient(notebook, resources=where, coalesce_streams=True, record_timing=False)
    return client.execute()


def main(names: list[str]) -> None:
    for name in names or sorted(path.stem for path in FOLDER.glob("*.ipynb")):
        nbformat.write(execute(name), FOLDER / f"{name}.ipynb")
        print(f"{name}: executed")


if __name__ == "__main__":
    main(sys.argv[1:])
