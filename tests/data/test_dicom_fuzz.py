"""Randomly damaged files: whatever happens, only ReadError leaves the reader."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from pydicom.uid import (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)
from synthetic_series import transcode, write_enhanced, write_series

from aneurysm.data.dicom.series import find_series, read_series
from aneurysm.data.errors import ReadError

KINDS = [
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
    JPEGLSLossless,
    JPEGLosslessSV1,
    "enhanced",
]


@pytest.fixture(scope="module")
def stored() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 4095, (4, 8, 9)).astype(np.uint16)


def damaged(whole: bytes, rng: np.random.Generator) -> bytes:
    """Cut short, or with a few bytes of the header, or of anything, replaced."""
    how = rng.integers(4)
    if how == 0:
        return whole[: rng.integers(len(whole))]
    data = bytearray(whole)
    end = data.index(b"\xe0\x7f\x10\x00") + 12 if how < 3 else len(data)
    for at in rng.integers(128, end, rng.integers(1, 5)):
        data[at] = rng.integers(256)
    if how == 2:  # a hole that shifts the rest
        at = int(rng.integers(128, end))
        del data[at : at + int(rng.integers(1, 9))]
    return bytes(data)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_only_read_errors_escape(tmp_path: Path, stored, kind):
    if kind == "enhanced":
        files = [write_enhanced(tmp_path / "a.dcm", stored)]
    else:
        files = write_series(tmp_path, stored)
        if kind != ExplicitVRLittleEndian:
            for path in files:
                transcode(path, kind)
    target = files[len(files) // 2]
    whole = target.read_bytes()
    rng = np.random.default_rng(7)
    outcomes = {"read": 0, "refused": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(60):
            target.write_bytes(damaged(whole, rng))
            try:
                find_series(tmp_path)
                scan = read_series(tmp_path)
            except ReadError as error:
                outcomes["refused"] += 1
                assert "\n" not in str(error)
                continue
            outcomes["read"] += 1
            assert np.isfinite(scan.volume).all()
    assert min(outcomes.values()) > 5, outcomes  # the damage reaches both ends


def test_every_cut_of_a_plain_file_is_refused(tmp_path, stored):
    files = write_series(tmp_path, stored)
    whole = files[1].read_bytes()
    for length in np.random.default_rng(0).integers(0, len(whole) - 1, 60):
        files[1].write_bytes(whole[:length])
        with pytest.raises(ReadError):
            read_series(tmp_path)
