"""Where the reference material lies; tests that need it skip with the reason when it is absent."""

import sys
from pathlib import Path

import pytest

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(autouse=True)
def seeded() -> None:
    """What a test draws without a seed of its own does not depend on the tests before it."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


def _folder(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"reference material {name!r} is not beside this checkout")
    return folder


@pytest.fixture(scope="session")
def golden() -> Path:
    """Numbers computed by the original implementations."""
    return _folder("golden")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real scans, meshes and DICOM series."""
    return _folder("data")
