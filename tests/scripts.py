"""Scripts that are no part of the package, as modules."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def script(path):
    """The module of a script, by its path in the repository."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
