"""The notebooks run from top to bottom and print what they show."""

import contextlib
import io
import json
from pathlib import Path

import pytest

from ftp_lightning.errors import UserError
from ftp_lightning.models import title

NOTEBOOKS = sorted((Path(__file__).parents[1] / "docs" / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_prints_what_it_shows(path):
    notebook, names = json.loads(path.read_text(encoding="utf-8")), {}
    if (needed := notebook["metadata"].get("needs")) is not None:
        try:
            title(needed)
        except UserError as error:
            pytest.skip(str(error).splitlines()[0])
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            said = io.StringIO()
            with contextlib.redirect_stdout(said):
                exec("".join(cell["source"]), names)
            assert said.getvalue() == "".join("".join(output["text"]) for output in cell["outputs"])


def test_there_are_notebooks():
    assert {"inside", "quick_start", "tune", "add_a_router"} <= {path.stem for path in NOTEBOOKS}
