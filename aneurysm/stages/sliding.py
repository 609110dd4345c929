"""A network slid over a whole volume, or over a box of it, in little more memory than the result takes.

Windows are visited row by row along the longest axis. What they say is added up in a slab as thick as a
window; planes that no later window sees are divided by the weights, made probabilities and written out.
Blending is that of MONAI's `sliding_window_inference` (Gaussian weights of 1/8 of the window, not below
1/1000), to which this agrees within 1e-6.

Why not MONAI's: it holds the sums and the weights of the whole volume as float32 and divides at the end. On
512 x 512 x 300 voxels, windows of 96 and an overlap of one half it takes 1.2 GB and 4.6 CPU seconds for the
stitching alone; this takes a sixth of the memory (`benchmarks/whole_head.py`, docs/whole_head.md). Nor can it
be told to visit only the windows of a box and still give there, bit for bit, what it gives for the whole.

Shapes: k channels that the net gives, v views (the volume as it is, and flipped along single axes).
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise, product

import numpy as np
import torch
from torch import Tensor, nn

from aneurysm.stages.windows import Box, Index, Starts, View, lattice

STEPS = 255  # uint8 results are in these steps, as probabilities are stored
LEAST_WEIGHT = 1e-3
_AT_ONCE = 8  # planes that are divided at a time
# Voxels whose probabilities are made at a time. A processor makes those that are left over at the end of an
# array, or of a thread's share of it, by another formula, with another last bit: blocks of this size, too
# small to be shared out, leave none.
_TOGETHER = 8192


@torch.no_grad()
def slide(
    net: nn.Module,
    inputs: np.ndarray | Sequence[np.ndarray],
    view: View,
    box: Box | None = None,
    starts: Starts | None = None,
    activate: Callable[[Tensor], Tensor] = torch.sigmoid,
    dtype: type[np.generic] = np.float32,
    batch: int = 2,
    accumulator: torch.device | str | None = None,
) -> np.ndarray:
    """What `net` says of every voxel of a box, mean over views.

    A voxel whose windows are the same gets the same value, bit for bit, whatever else is visited and wherever
    the box ends; windows also read what lies beyond the box. This holds where the net's answer to a window
    does not depend on the others of its batch, as with instance norm, and `batch` is the same.

    Args:
        net: (b, c, w, w, w) float32 -> (b, k, w, w, w) logits; it is put into evaluation mode and back.
        inputs: (c, d, h, w) float32, or its c volumes (d, h, w), which then need not be copied together.
        box: voxels that are wanted; None: all.
        starts: of the windows along each axis, which cover the box (`windows.place`); None: MONAI's.
        activate: from logits (v, k, voxels) to what is averaged over views and returned.
        dtype: of the result: float32, float16, or uint8 in steps of 1/255.
        batch: windows at a time.
        accumulator: where sums are kept; None: where the net is.

    Returns:
        (k, d, h, w) of the volume; what lies outside the box is 0.

    Raises:
        ValueError: the box lies outside the volume, the windows do not cover it, or the net changes the size
            of a window.
    """
    volumes = [torch.from_numpy(np.ascontiguousarray(volume, np.float32)) for volume in inputs]
    shape = tuple(volumes[0].shape)
    box = Box((0, 0, 0), shape) if box is None else box
    box.check_inside(shape)
    starts = lattice(shape, view) if starts is None else starts
    target = (slice(None), *box.slices)
    # A volume smaller than the window is continued by its border, and the result is a box of it.
    lacking = [max(view.window - n, 0) for n in shape]
    if any(lacking):
        volumes = [_continued(volume, lacking) for volume in volumes]
        box = box.moved([n // 2 for n in lacking])
    _check_cover(starts, box, view.window)
    starts = tuple(
        [s for s in along if s < high and s + view.window > low]
        for along, low, high in zip(starts, box.start, box.stop, strict=True)
    )
    home = next(net.parameters(), torch.empty(0)).device
    axis = int(np.argmax(volumes[0].shape))
    slab = _Slab(starts, box, view, axis, torch.device(accumulator or home), activate)
    result: np.ndarray | None = None
    was_training = net.training
    net.eval()
    try:
        for (corner, which), answer in _answers(net, volumes, slab.visits(), view, batch, home):
            if result is None:
                result = np.zeros((len(answer), *shape), dtype)
            for planes, values in slab.add(corner, which, answer):
                _write(result[target], axis, planes, values)
        assert result is not None  # windows cover the box
        for planes, values in slab.finish():
            _write(result[target], axis, planes, values)
    finally:
        net.train(was_training)
    return result


def gaussian_weights(window: int) -> Tensor:
    """(w, w, w) float32: a Gaussian around the middle of the window whose sigma is 1/8 of its side."""
    x = torch.arange(window, dtype=torch.float32) - (window - 1) / 2
    g = torch.exp(x**2 / (-2 * (window * 0.125) ** 2))
    weights = g[:, None, None] * g[None, :, None] * g[None, None, :]
    return weights.clamp_(min=max(float(weights.min()), LEAST_WEIGHT))


Visit = tuple[Index, int]  # first voxel of a window, number of the view


def _answers(
    net: nn.Module,
    volumes: list[Tensor],
    visits: list[Visit],
    view: View,
    batch: int,
    home: torch.device,
) -> Iterator[tuple[Visit, Tensor]]:
    """The net's logits (k, w, w, w) window by window, turned back as the volume lies."""
    size = view.window
    windows = torch.empty((batch, len(volumes), size, size, size))
    for first in range(0, len(visits), batch):
        part = visits[first : first + batch]
        # The last batch keeps earlier windows: convolutions of other batch sizes differ in the last bits.
        for window, (corner, which) in zip(windows, part, strict=False):
            place = tuple(slice(s, s + size) for s in corner)
            for channel, volume in zip(window, volumes, strict=True):
                channel.copy_(_flipped(volume[place], view.axes[which]))
        logits = net(windows.to(home))
        if tuple(logits.shape[2:]) != (size,) * 3:
            raise ValueError(
                f"A network that slides gives its answer in the size of the window, {size}^3, "
                f"but this one gave {tuple(logits.shape[2:])}."
            )
        for (corner, which), answer in zip(part, logits, strict=False):
            yield (corner, which), _flipped(answer.float(), view.axes[which])


def _flipped(volume: Tensor, axes: tuple[int, ...]) -> Tensor:
    return volume.flip(axes) if axes else volume  # a flip along no axis is a copy


class _Slab:
    """Weighted sums (v, k, d, h, w) over the box, along `axis` only over the planes that are not finished.

    Planes are counted from the start of the box.
    """

    def __init__(
        self,
        starts: Starts,
        box: Box,
        view: View,
        axis: int,
        device: torch.device,
        activate: Callable[[Tensor], Tensor],
    ) -> None:
        self.box, self.view, self.axis, self.device, self.activate = box, view, axis, device, activate
        self.starts = starts
        self.weights = gaussian_weights(view.window).to(device)
        self.sums: Tensor | None = None
        self.first = 0  # plane of the box at which the slab begins

    def visits(self) -> list[Visit]:
        """Every window of every view, row by row along the axis."""
        rows = self.starts[self.axis]
        others = [self.starts[a] for a in range(3) if a != self.axis]
        corners = (
            (row, *place[: self.axis], *place[self.axis :]) for row, place in product(rows, product(*others))
        )
        ordered = []
        for row, *place in corners:
            place.insert(self.axis, row)
            ordered.append((place[0], place[1], place[2]))
        return [(corner, which) for corner in ordered for which in range(len(self.view.axes))]

    def add(self, corner: Index, which: int, answer: Tensor) -> Iterator[tuple[slice, np.ndarray]]:
        """Add the logits (k, w, w, w) of a window; gives the planes that this and later ones do not see."""
        yield from self._advance(corner[self.axis] - self.box.start[self.axis])
        if self.sums is None:
            size = list(self.box.size)
            size[self.axis] = min(self.view.window, size[self.axis])
            views = len(self.view.axes)
            self.sums = torch.zeros((views, len(answer), *size), device=self.device)
        there, here = [], []
        for a in range(3):
            origin = self.box.start[a] + (self.first if a == self.axis else 0)
            low = max(corner[a], origin)
            high = min(corner[a] + self.view.window, self.box.stop[a])
            there.append(slice(low - origin, high - origin))
            here.append(slice(low - corner[a], high - corner[a]))
        # Multiplied, then added: a fused step may round differently at the ends of rows.
        part = answer[(slice(None), *here)].to(self.device) * self.weights[tuple(here)]
        self.sums[(which, slice(None), *there)] += part

    def finish(self) -> Iterator[tuple[slice, np.ndarray]]:
        """The planes that are left."""
        yield from self._advance(self.box.size[self.axis])

    def _advance(self, plane: int) -> Iterator[tuple[slice, np.ndarray]]:
        """Give all planes before `plane` (of the box) and make room."""
        if self.sums is None or plane <= self.first:
            return
        for low in range(self.first, plane, _AT_ONCE):
            high = min(low + _AT_ONCE, plane)
            yield slice(low, high), self._planes(low, high)
        # What waits moves to the front, in steps that do not overlap.
        gone, depth = plane - self.first, self.sums.shape[2 + self.axis]
        for low in range(0, depth - gone, gone):
            count = min(gone, depth - gone - low)
            self._cut(low, count).copy_(self._cut(low + gone, count))
        self._cut(max(depth - gone, 0), min(gone, depth)).zero_()
        self.first = plane

    def _cut(self, start: int, count: int) -> Tensor:
        assert self.sums is not None
        return self.sums.narrow(2 + self.axis, start, count)

    def _planes(self, low: int, high: int) -> np.ndarray:
        """Finished values (k, ...) of planes of the box."""
        logits = self._cut(low - self.first, high - low) / self._weights_of(low, high)
        flat = logits.flatten(2)
        voxels = flat.shape[2]
        flat = nn.functional.pad(flat, (0, -voxels % _TOGETHER))
        values = torch.cat([self.activate(part.contiguous()) for part in flat.split(_TOGETHER, 2)], 2)
        total = values[0]
        for other in values[1:]:
            total = total + other
        mean = (total / len(values))[:, :voxels]
        return mean.reshape(len(mean), *logits.shape[2:]).cpu().numpy()

    def _weights_of(self, low: int, high: int) -> Tensor:
        """Sum of the weights (d, h, w) of all windows that see planes of the box.

        Made anew for the few planes: held for the whole box it would be as large as a channel.
        """
        size, origin = self.view.window, self.box.start[self.axis]
        shape = list(self.box.size)
        shape[self.axis] = high - low
        total = torch.zeros(shape, device=self.device)
        along = [s - origin for s in self.starts[self.axis]]
        for row in [s for s in along if s < high and s + size > low]:
            for place in product(*(self.starts[a] for a in range(3) if a != self.axis)):
                corner = list(place)
                corner.insert(self.axis, row + origin)
                there, here = [], []
                for a, s in enumerate(corner):
                    first, last = self.box.start[a], self.box.stop[a]
                    if a == self.axis:
                        first, last = origin + low, origin + high
                    start, stop = max(s, first), min(s + size, last)
                    there.append(slice(start - first, stop - first))
                    here.append(slice(start - s, stop - s))
                total[tuple(there)] += self.weights[tuple(here)]
        return total


def _continued(volume: Tensor, lacking: list[int]) -> Tensor:
    around = [n for lack in reversed(lacking) for n in (lack // 2, lack - lack // 2)]
    return nn.functional.pad(volume[None, None], around, mode="replicate")[0, 0]


def _check_cover(starts: Starts, box: Box, window: int) -> None:
    for along, low, high in zip(starts, box.start, box.stop, strict=True):
        gaps = [b - a > window for a, b in pairwise(along)]
        if along[0] > low or along[-1] + window < high or any(gaps):
            raise ValueError(f"Windows of {window} that start at {along} do not cover {low} to {high}.")


def _write(out: np.ndarray, axis: int, planes: slice, values: np.ndarray) -> None:
    if out.dtype == np.uint8:
        values = np.round(values * STEPS)
    out[(slice(None),) * (1 + axis) + (planes,)] = values
