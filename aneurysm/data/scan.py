"""What a scan is: voxels on a grid in RAS+ millimetres, with what is known about the patient.

Arrays are (d, h, w). In canonical form the index grows to superior along d, to anterior along h and to
the patient's right along w, so a left-right flip is a flip of the last axis. An affine maps the
homogeneous index (d, h, w, 1) to world (x, y, z, 1) in RAS+ millimetres.
"""

from dataclasses import dataclass, field

import numpy as np

from aneurysm.data.labels import LOCATIONS, MODALITIES


@dataclass(frozen=True, eq=False)
class Grid:
    """Where the voxels of an array lie in the world."""

    shape: tuple[int, int, int]
    affine: np.ndarray  # (4, 4) float64, index (d, h, w, 1) -> RAS mm (x, y, z, 1)

    def __post_init__(self) -> None:
        affine = np.asarray(self.affine, dtype=np.float64)
        object.__setattr__(self, "affine", affine)
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        if affine.shape != (4, 4) or not np.isfinite(affine).all():
            raise ValueError(f"A grid needs a finite 4x4 affine but got {affine.tolist()}.")
        if abs(np.linalg.det(affine[:3, :3])) < 1e-9:
            raise ValueError("The affine is not invertible: two voxel axes coincide or a spacing is zero.")
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise ValueError(f"A grid has three axes of at least one voxel but got shape {self.shape}.")

    @property
    def spacing(self) -> np.ndarray:
        """Voxel size along (d, h, w) in mm."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)

    @property
    def voxel_mm3(self) -> float:
        """Volume of a voxel in mm^3."""
        return float(abs(np.linalg.det(self.affine[:3, :3])))

    @property
    def centre_mm(self) -> np.ndarray:
        """World position (x, y, z) of the middle of the grid, in mm."""
        return self.to_mm((np.array(self.shape) - 1) / 2)

    def to_mm(self, index: np.ndarray) -> np.ndarray:
        """Voxel indices (..., 3) as (d, h, w) -> world positions (..., 3) as (x, y, z) in mm."""
        return np.asarray(index, dtype=np.float64) @ self.affine[:3, :3].T + self.affine[:3, 3]

    def to_index(self, mm: np.ndarray) -> np.ndarray:
        """World positions (..., 3) in mm -> fractional voxel indices (..., 3) as (d, h, w)."""
        inverse = np.linalg.inv(self.affine)
        return np.asarray(mm, dtype=np.float64) @ inverse[:3, :3].T + inverse[:3, 3]

    def same_as(self, other: "Grid", tolerance_mm: float = 1e-3) -> bool:
        """Whether both grids put every voxel at the same place, within a tolerance in mm."""
        return self.shape == other.shape and bool(np.allclose(self.affine, other.affine, atol=tolerance_mm))


@dataclass(frozen=True, eq=False)
class Scan:
    """One series of one patient in canonical orientation."""

    series_uid: str
    patient_id: str
    modality: str  # one of MODALITIES
    volume: np.ndarray  # (d, h, w) float32; HU for CTA, arbitrary units for MR
    grid: Grid  # of `volume`, canonical
    source: Grid  # the grid as stored in the input files; predictions are written back on it
    age: float | None = None  # years
    sex: str | None = None  # "M", "F"
    notes: tuple[str, ...] = ()  # what the reader dropped, repaired or guessed

    def __post_init__(self) -> None:
        if self.modality not in MODALITIES:
            raise ValueError(
                f"{self.series_uid}: modality must be one of {MODALITIES}, got {self.modality!r}."
            )
        if self.volume.shape != self.grid.shape:
            raise ValueError(f"{self.series_uid}: volume {self.volume.shape} on a grid {self.grid.shape}.")
        if not all(np.isfinite(plane).all() for plane in self.volume):  # without a mask of the whole
            bad = int((~np.isfinite(self.volume)).sum())
            raise ValueError(
                f"{self.series_uid}: {bad} voxels are NaN or infinite. Replace them before reading."
            )


@dataclass(frozen=True, eq=False)
class Lesion:
    """One annotated aneurysm."""

    centre_mm: np.ndarray  # (3,) RAS mm
    radius_mm: float | None = None  # of the sphere with the sac's volume; None when only a point is known
    location: int | None = None  # index into LOCATIONS; None when unknown


@dataclass(frozen=True, eq=False)
class Case:
    """A scan with what is known about its vessels and aneurysms."""

    scan: Scan
    vessel: np.ndarray | None = None  # (d, h, w) uint8, 0 background, else a vessel label
    aneurysm: np.ndarray | None = None  # (d, h, w) uint8, 0 background, k inside lesion k
    lesions: tuple[Lesion, ...] = ()
    present: bool | None = None  # None when unlabelled
    locations: np.ndarray = field(  # (13,) float32: 0, 1, or NaN where unknown
        default_factory=lambda: np.full(len(LOCATIONS), np.nan, np.float32)
    )

    def __post_init__(self) -> None:
        for name in ("vessel", "aneurysm"):
            mask = getattr(self, name)
            if mask is not None and mask.shape != self.scan.grid.shape:
                raise ValueError(
                    f"{self.scan.series_uid}: {name} mask {mask.shape} does not match the scan "
                    f"{self.scan.grid.shape}. Resample the mask onto the scan's grid."
                )
