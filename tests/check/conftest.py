"""A small clean data set that the tests of the check share; they copy what they spoil."""

from pathlib import Path

import pytest

from aneurysm.data.phantom.dataset import PhantomSource


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four patients, RSNA layout."""
    return PhantomSource(tmp_path_factory.mktemp("phantoms"), 4, 3, size=44, jobs=1).root
