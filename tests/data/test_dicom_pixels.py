"""Stored values of DICOM files: every compression, bit layout and meaning of values."""

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)
from scipy.ndimage import gaussian_filter
from synthetic_series import transcode, write_enhanced, write_series

from aneurysm.data.dicom.series import read_series
from aneurysm.data.errors import ReadError

LOSSLESS = [RLELossless, JPEGLSLossless, JPEG2000Lossless, JPEGLossless, JPEGLosslessSV1]
PLAIN = [ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian]


def smooth(bits: int, signed: bool, shape: tuple[int, int, int] = (4, 32, 40)) -> np.ndarray:
    """Values over the whole range of the bits."""
    field = gaussian_filter(np.random.default_rng(bits).normal(size=shape), 2)
    field = (field - field.min()) / np.ptp(field)
    low = -(1 << bits - 1) if signed else 0
    return (low + field * ((1 << bits) - 1)).astype(f"{'i' if signed else 'u'}{1 if bits == 8 else 2}")


def bits_of(stored: np.ndarray, bits: int):
    def change(ds, i):
        ds.BitsAllocated, ds.BitsStored, ds.HighBit = stored.itemsize * 8, bits, bits - 1

    return change


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("syntax", [*PLAIN, *LOSSLESS], ids=lambda uid: uid.keyword)
def test_every_lossless_syntax_gives_the_stored_values(tmp_path, syntax, bits, signed):
    stored = smooth(bits, signed)
    for path in write_series(tmp_path, stored, change=bits_of(stored, bits)):
        transcode(path, syntax)
        assert dcmread(path).file_meta.TransferSyntaxUID == syntax
    np.testing.assert_array_equal(read_series(tmp_path).volume, stored[:, ::-1, ::-1])


@pytest.mark.parametrize(("syntax", "bits"), [(JPEGBaseline8Bit, 8), (JPEGExtended12Bit, 12)])
def test_lossy_jpeg_is_near(tmp_path, syntax, bits):
    stored = smooth(bits, signed=False)
    for path in write_series(tmp_path, stored, change=bits_of(stored, bits)):
        transcode(path, syntax)
    np.testing.assert_allclose(read_series(tmp_path).volume, stored[:, ::-1, ::-1], atol=2)


def test_jpeg_without_its_end_is_refused(tmp_path):
    """Cut before it was wrapped: the file itself is complete."""
    stored = smooth(12, signed=False)
    files = write_series(tmp_path, stored, change=bits_of(stored, 12))
    for path in files:
        transcode(path, JPEGLosslessSV1)
    ds = dcmread(files[2])
    frame = next(generate_frames(ds.PixelData, number_of_frames=1))
    ds.PixelData = encapsulate([frame[: len(frame) // 2]])
    ds.save_as(files[2])
    with pytest.raises(ReadError, match=r"002.dcm: .* no end"):
        read_series(tmp_path)


@pytest.mark.parametrize(
    "syntax", [RLELossless, JPEGLSLossless, JPEGLosslessSV1], ids=lambda uid: uid.keyword
)
def test_compressed_frames_of_one_file(tmp_path, syntax):
    """Frames stored out of order, with and without their table of offsets."""
    stored = smooth(12, signed=False)
    order = np.array([2, 0, 3, 1])
    singles = write_series(tmp_path / "singles", stored, change=bits_of(stored, 12))
    for path in singles:
        transcode(path, syntax)
    frames = [next(generate_frames(dcmread(path).PixelData, number_of_frames=1)) for path in singles]
    for has_table in (True, False):

        def compressed(ds, has_table=has_table):
            ds.BitsStored, ds.HighBit = 12, 11
            ds.file_meta.TransferSyntaxUID = syntax
            ds.PixelData = encapsulate([frames[i] for i in order], has_bot=has_table)
            ds["PixelData"].VR = "OB"

        path = write_enhanced(tmp_path / f"{has_table}.dcm", stored, order=order, change=compressed)
        np.testing.assert_array_equal(read_series([path]).volume, stored[:, ::-1, ::-1])


def test_one_image_in_several_fragments(tmp_path):
    stored = smooth(12, signed=False)
    for path in write_series(tmp_path, stored, change=bits_of(stored, 12)):
        transcode(path, JPEGLSLossless)
        ds = dcmread(path)
        ds.PixelData = encapsulate(list(generate_frames(ds.PixelData, number_of_frames=1)), 3, has_bot=False)
        ds.save_as(path)
    np.testing.assert_array_equal(read_series(tmp_path).volume, stored[:, ::-1, ::-1])


def test_threads_change_nothing(tmp_path):
    stored = smooth(12, signed=False, shape=(7, 32, 40))
    for path in write_series(tmp_path, stored, change=bits_of(stored, 12)):
        transcode(path, RLELossless)
    np.testing.assert_array_equal(read_series(tmp_path, threads=3).volume, stored[:, ::-1, ::-1])


@pytest.mark.parametrize("signed", [False, True])
def test_overlay_above_the_stored_bits_is_cut_off(tmp_path, signed):
    stored = smooth(12, signed)
    overlay = np.random.default_rng(0).integers(0, 2, stored.shape).astype(np.uint16) << 14
    spoiled = ((stored.view(np.uint16) & 0x0FFF) | overlay).view(stored.dtype)
    scan = read_series(write_series(tmp_path, spoiled, change=bits_of(stored, 12)))
    np.testing.assert_array_equal(scan.volume, stored[:, ::-1, ::-1])
    assert any("overlay" in note for note in scan.notes)


def test_values_in_the_upper_bits(tmp_path):
    stored = smooth(12, signed=False)

    def high(ds, i):
        ds.BitsStored, ds.HighBit = 12, 15

    scan = read_series(write_series(tmp_path, stored << 4, change=high))
    np.testing.assert_array_equal(scan.volume, stored[:, ::-1, ::-1])


def test_padding_that_reads_as_bright_is_darkened(tmp_path):
    """-2000 stored as an unsigned number is 63536."""
    stored = smooth(12, signed=False)
    stored[:, :5] = 63536

    def change(ds, i):
        ds["PixelPaddingValue"] = ds["Rows"].__class__("PixelPaddingValue", "US", 63536)

    scan = read_series(write_series(tmp_path, stored, change=change))
    expected = np.where(stored == 63536, 0, stored)
    assert scan.volume.max() == expected.max()
    np.testing.assert_array_equal(scan.volume[:, ::-1, ::-1][:, 5:], expected[:, 5:])
    assert any("padding" in note for note in scan.notes)


def test_dark_padding_stays_as_stored(tmp_path):
    stored = smooth(12, signed=True)
    stored[:, :5] = -2000

    def change(ds, i):
        ds["PixelPaddingValue"] = ds["Rows"].__class__("PixelPaddingValue", "SS", -2000)

    scan = read_series(write_series(tmp_path, stored, change=change))
    np.testing.assert_array_equal(scan.volume, stored[:, ::-1, ::-1])


@pytest.mark.parametrize(("modality", "intercept"), [("MR", 0), ("CT", -1024)])
def test_monochrome1(tmp_path, modality, intercept):
    """Inverted grey values of an MR are turned; Hounsfield units are what they are."""
    stored = smooth(12, signed=False)

    def change(ds, i):
        bits_of(stored, 12)(ds, i)
        ds.PhotometricInterpretation = "MONOCHROME1"

    scan = read_series(write_series(tmp_path, stored, change=change, modality=modality, intercept=intercept))
    expected = stored.astype(np.float32) - 1024 if modality == "CT" else 4095 - stored.astype(np.float32)
    np.testing.assert_array_equal(scan.volume, expected[:, ::-1, ::-1])
    assert any("MONOCHROME1" in note for note in scan.notes)


def test_float_pixels(tmp_path):
    stored = np.random.default_rng(0).normal(size=(4, 6, 5)).astype(np.float32)

    def change(ds, i, bad=False):
        plane = stored[i].copy()
        plane[0, 0] = np.nan if bad and i == 2 else plane[0, 0]
        ds.BitsAllocated = 32
        for tag in ("PixelData", "BitsStored", "HighBit", "PixelRepresentation"):
            delattr(ds, tag)
        ds.FloatPixelData = plane.tobytes()

    scan = read_series(write_series(tmp_path / "good", stored, change=change))
    np.testing.assert_array_equal(scan.volume, stored[:, ::-1, ::-1])
    with pytest.raises(ReadError, match=r"002.dcm: some pixels are NaN"):
        read_series(write_series(tmp_path / "bad", stored, change=lambda ds, i: change(ds, i, True)))


def hounsfield(shape: tuple[int, int, int] = (5, 40, 40)) -> np.ndarray:
    """A head of 40 HU with noise, bone and contrast, in air."""
    volume = np.random.default_rng(0).normal(-1000, 15, shape)
    volume[:, 8:32, 8:32] = np.random.default_rng(1).normal(40, 15, (shape[0], 24, 24))
    volume[:, 8:10, 8:32], volume[:, 20:22, 20:22] = 1100, 350
    return volume.round().astype(np.int16)


@pytest.mark.parametrize("padding", [None, -2000, -1024])
@pytest.mark.parametrize("applied", [False, True])
def test_intercept_of_a_ct_is_applied_once(tmp_path, applied, padding):
    """Whatever fills the corners outside the round field of view."""
    values = hounsfield()
    stored = values if applied else values + 1024
    expected = values.astype(np.float32)
    if padding is not None:
        stored[:, :6, :6] = padding
        expected[:, :6, :6] = padding - (0 if applied else 1024)
    scan = read_series(write_series(tmp_path, stored, modality="CT", intercept=-1024))
    np.testing.assert_array_equal(scan.volume, expected[:, ::-1, ::-1])
    assert any("Hounsfield units already" in note for note in scan.notes) == applied


def test_lost_intercept_of_a_ct_is_found(tmp_path):
    values = hounsfield()

    def change(ds, i):
        del ds.RescaleIntercept, ds.RescaleSlope

    scan = read_series(
        write_series(tmp_path / "a", (values + 1024).clip(0).astype(np.uint16), modality="CT", change=change)
    )
    np.testing.assert_array_equal(scan.volume, values.clip(-1024)[:, ::-1, ::-1])
    assert any("no rescale intercept" in note for note in scan.notes)
    scan = read_series(write_series(tmp_path / "b", values, modality="CT", change=change))
    np.testing.assert_array_equal(scan.volume, values[:, ::-1, ::-1])


@pytest.mark.parametrize("syntax", LOSSLESS, ids=lambda uid: uid.keyword)
@pytest.mark.parametrize("left", [0.3, 0.9])
def test_truncated_compressed_file_is_named(tmp_path, syntax, left):
    stored = smooth(12, signed=False)
    files = write_series(tmp_path, stored, change=bits_of(stored, 12))
    for path in files:
        transcode(path, syntax)
    whole = files[2].read_bytes()
    start = whole.index(b"\xe0\x7f\x10\x00")
    files[2].write_bytes(whole[: start + int(left * (len(whole) - start))])
    with pytest.raises(ReadError, match=r"002.dcm: .*(truncated|no pixel data)"):
        read_series(tmp_path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [("short", "need 2560. The file is truncated"), ("long", "need 2560"), ("rows", "need"),
     ("says compressed", "uncompressed pixels"), ("says plain", "compressed pixels"),
     ("bits", "no grey values"), ("palette", "screenshot"), ("unknown", "no known image format|cannot be")],
)  # fmt: skip
def test_pixels_that_contradict_the_header(tmp_path, spoil, message):
    stored = smooth(12, signed=False)

    def change(ds, i):
        bits_of(stored, 12)(ds, i)
        if i != 1:
            return
        if spoil == "short":
            ds.PixelData = ds.PixelData[:-100]
        if spoil == "long":
            ds.PixelData = ds.PixelData * 2
        if spoil == "bits":
            ds.BitsStored = 20
        if spoil == "palette":
            ds.PhotometricInterpretation = "PALETTE COLOR"
        if spoil == "says compressed":
            ds.file_meta.TransferSyntaxUID = RLELossless

    files = write_series(tmp_path, stored, change=change) if spoil != "says compressed" else None
    if spoil == "says compressed":
        files = write_series(tmp_path, stored, change=bits_of(stored, 12))
        whole = files[1].read_bytes()
        uid = b"1.2.840.10008.1.2.1\0"
        assert uid in whole
        files[1].write_bytes(whole.replace(uid, b"1.2.840.10008.1.2.5\0"))
    if spoil == "rows":
        files = write_series(tmp_path, stored, change=bits_of(stored, 12))
        for path in files:
            ds = dcmread(path)
            ds.Rows += 2
            ds.save_as(path)
    if spoil in ("says plain", "unknown"):
        transcode(files[1], JPEGLSLossless)
        whole = files[1].read_bytes()
        uid = b"1.2.840.10008.1.2.4.80"
        other = b"1.2.840.10008.1.2.1\0\0\0" if spoil == "says plain" else b"1.2.840.10008.1.2.4.99"
        files[1].write_bytes(whole.replace(uid, other))
    with pytest.raises(ReadError, match=message):
        read_series(tmp_path)


def test_file_without_the_dicom_marker(tmp_path):
    """Old archives hold bare data sets."""
    stored = smooth(12, signed=False)
    for path in write_series(tmp_path, stored, change=bits_of(stored, 12)):
        transcode(path, ImplicitVRLittleEndian)
        whole = path.read_bytes()
        path.write_bytes(whole[whole.index(b"\x08\x00\x16\x00") :])
    scan = read_series(tmp_path)
    np.testing.assert_array_equal(scan.volume, stored[:, ::-1, ::-1])
    assert any("without transfer syntax" in note for note in scan.notes)


def test_deflated_file_cut_short_is_named(tmp_path):
    stored = smooth(12, signed=False)
    files = write_series(tmp_path, stored, change=bits_of(stored, 12))
    for path in files:
        transcode(path, DeflatedExplicitVRLittleEndian)
    files[1].write_bytes(files[1].read_bytes()[:-300])
    with pytest.raises(ReadError, match=r"001.dcm: "):
        read_series(tmp_path)
