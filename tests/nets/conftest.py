"""What the parity tests of several networks read."""

import importlib.util

import pytest


@pytest.fixture(scope="session")
def seedfill(golden):
    """The module that makes the originals' weights again from their parameter names."""
    spec = importlib.util.spec_from_file_location("seedfill", golden / "seedfill.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
