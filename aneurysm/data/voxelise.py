"""From a triangle mesh to the share of every voxel that lies inside it."""

from types import ModuleType

import numpy as np
from scipy import ndimage
from scipy.spatial import KDTree

from aneurysm.data.scan import Grid

_LARGEST_RADIUS_MM = 12.0  # no vessel or sac is wider: what lies deeper inside is a flood
_END_MM = 3.5  # an open vessel end has no wall for up to its radius


class VoxelisationError(ValueError):
    """A mesh gave no usable volume; the message says how it failed."""


def voxelise(vertices: np.ndarray, faces: np.ndarray, grid: Grid, supersample: int = 2) -> np.ndarray:
    """Which sub-voxels of a grid lie inside a surface that may be open at vessel ends.

    Open ends are closed by straight lines in every slice. Where that goes wrong the holes are filled with
    triangles and the mesh is tried again; if no more than 1 % of the lumen leaks, the leak is removed.

    Args:
        vertices: (v, 3) RAS mm.
        faces: (f, 3) integers, triangles.
        grid: axis-aligned and canonical; the mesh may reach beyond it.
        supersample: sub-voxels along each edge of a voxel.

    Returns:
        bool (d * supersample, h * supersample, w * supersample).

    Raises:
        VoxelisationError: nothing lies inside although the surface crosses the grid, or too much leaks.
        ImportError: VTK is not installed.
    """
    fine = subdivided(grid, supersample)
    worst = ""
    for fill_holes in (False, True):
        inside = _rasterise(vertices, faces, fine, fill_holes)
        touched = partial_volume(inside, supersample) > 0
        missed, leaked = faults(touched, grid, vertices)
        if missed <= 0.1 and leaked.sum() <= 0.01 * touched.sum():
            if leaked.any():
                inside[leaked.repeat(supersample, 0).repeat(supersample, 1).repeat(supersample, 2)] = False
            return inside
        worst = f"{missed:.0%} of the surface has no lumen beside it, {leaked.sum()} voxels leak"
    raise VoxelisationError(f"The mesh cannot be voxelised: {worst}. Check that it is one surface in mm.")


def subdivided(grid: Grid, supersample: int) -> Grid:
    """The grid whose voxels are `grid`'s, each cut into supersample^3."""
    axes = grid.affine[:3, :3]
    if supersample < 1 or not np.allclose(axes, np.fliplr(np.diag(np.diag(np.fliplr(axes)))), atol=1e-6):
        raise ValueError(
            f"Meshes are voxelised on axis-aligned canonical grids, supersample >= 1; got {axes.tolist()}."
        )
    affine = grid.affine.copy()
    affine[:3, :3] /= supersample
    affine[:3, 3] = grid.to_mm(np.full(3, 0.5 / supersample - 0.5))
    d, h, w = (n * supersample for n in grid.shape)
    return Grid((d, h, w), affine)


def partial_volume(inside: np.ndarray, supersample: int) -> np.ndarray:
    """Share (float32, 0..1) of every voxel that is inside, from its sub-voxels (d*s, h*s, w*s)."""
    count = inside.astype(np.uint16)
    for axis in range(3):  # strided sums along one axis after the other are much faster than one over blocks
        lines = np.moveaxis(count, axis, 0)
        summed = np.add.reduce([lines[k::supersample] for k in range(supersample)])
        count = np.moveaxis(summed, 0, axis)
    return np.ascontiguousarray(count, np.float32) / np.float32(supersample**3)


def faults(touched: np.ndarray, grid: Grid, vertices: np.ndarray) -> tuple[float, np.ndarray]:
    """How a voxelisation contradicts its surface.

    Args:
        touched: bool (d, h, w), voxels that are inside at least in part.
        grid: of `touched`.
        vertices: (v, 3) RAS mm of the surface.

    Returns:
        The share of surface points in the grid without a touched voxel beside them, and a mask of touched
        voxels that lie far from every surface point but at the edge of the inside (a streak or flood through
        a hole).
    """
    margin = _LARGEST_RADIUS_MM / grid.spacing
    index = grid.to_index(vertices)
    near = vertices[((index > -margin) & (index < np.array(grid.shape) + margin)).all(1)]
    cells = np.rint(index).astype(int)
    cells = cells[((cells >= 1) & (cells < np.array(grid.shape) - 1)).all(1)]
    leaked = np.zeros(touched.shape, bool)
    if not len(cells):
        return 0.0, leaked
    beside = ndimage.maximum_filter(touched, size=3)
    missed = 1 - float(beside[tuple(cells.T)].mean())
    where = np.argwhere(touched)
    if len(where):
        to_surface, _ = KDTree(near).query(grid.to_mm(where))
        if to_surface.max() > _END_MM:
            to_edge = np.asarray(ndimage.distance_transform_edt(touched, sampling=grid.spacing))[touched]
            leaked[touched] = (to_surface - to_edge > _END_MM) | (to_surface > _LARGEST_RADIUS_MM)
    return missed, leaked


def _vtk() -> tuple[ModuleType, ModuleType]:
    try:
        import vtk
        from vtk.util import numpy_support
    except ImportError as error:
        raise ImportError(
            "Meshes are voxelised with VTK, which is an optional dependency: pip install 'aneurysm[mesh]'"
        ) from error
    return vtk, numpy_support


def _rasterise(vertices: np.ndarray, faces: np.ndarray, grid: Grid, fill_holes: bool) -> np.ndarray:
    vtk, convert = _vtk()
    low, high = grid.affine[2, 3], grid.to_mm(np.array(grid.shape))[2]
    z = vertices[faces, 2]
    if not fill_holes:  # triangles above and below the grid cross none of its slices
        faces = faces[(z.min(1) <= high) & (z.max(1) >= low)]
    if not len(faces):
        return np.zeros(grid.shape, bool)
    points = vtk.vtkPoints()
    points.SetData(convert.numpy_to_vtk(np.ascontiguousarray(vertices, np.float64), deep=True))
    cells = vtk.vtkCellArray()
    cells.SetData(
        convert.numpy_to_vtkIdTypeArray(np.arange(0, faces.size + 1, 3, dtype=np.int64), deep=True),
        convert.numpy_to_vtkIdTypeArray(np.ascontiguousarray(faces, np.int64).ravel(), deep=True),
    )
    surface = vtk.vtkPolyData()
    surface.SetPoints(points)
    surface.SetPolys(cells)
    if fill_holes:
        filler = vtk.vtkFillHolesFilter()
        filler.SetInputData(surface)
        filler.SetHoleSize(2 * _LARGEST_RADIUS_MM)
        filler.Update()
        surface = filler.GetOutput()
    d, h, w = grid.shape
    stencil = vtk.vtkPolyDataToImageStencil()
    stencil.SetInputData(surface)
    stencil.SetOutputOrigin(*grid.affine[:3, 3])
    stencil.SetOutputSpacing(*grid.spacing[::-1])
    stencil.SetOutputWholeExtent(0, w - 1, 0, h - 1, 0, d - 1)
    image = vtk.vtkImageStencilToImage()
    image.SetInputConnection(stencil.GetOutputPort())
    image.SetInsideValue(1)
    image.SetOutsideValue(0)
    image.SetOutputScalarTypeToUnsignedChar()
    image.Update()
    scalars = image.GetOutput().GetPointData().GetScalars()
    return convert.vtk_to_numpy(scalars).reshape(d, h, w).astype(bool)
