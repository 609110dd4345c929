"""Shape errors at the door of a network, before they turn into errors of some convolution far inside."""

from collections.abc import Sequence

from torch import Tensor

AXES = {1: ("n",), 2: ("h", "w"), 3: ("d", "h", "w")}


def expect_map(
    owner: str, x: Tensor, channels: int | None, axes: int | None = 3, channels_last: bool = False
) -> None:
    """Let a map (b, channels, *axes) pass.

    Args:
        owner: who asks, the first words of the message.
        channels: expected number, None for any.
        axes: expected number of spatial axes, None for any number.
        channels_last: the layout is (b, *axes, channels).
    Raises:
        ValueError: for another number of axes or channels, or an axis without voxels; says what came and what
            is expected.
    """
    right = x.ndim >= 2 if axes is None else x.ndim == axes + 2
    if right and (channels is None or x.shape[-1 if channels_last else 1] == channels) and x.numel():
        return
    spatial = ("*space",) if axes is None else AXES.get(axes, tuple(f"n{i}" for i in range(axes)))
    count = "c" if channels is None else str(channels)
    words = ("b", *spatial, count) if channels_last else ("b", count, *spatial)
    raise ValueError(
        f"{owner}: got a tensor of shape {tuple(x.shape)}, expected ({', '.join(words)})"
        + ("." if x.numel() else " with at least one voxel.")
    )


def expect_rows(owner: str, x: Tensor, columns: int, rows: int | None = None) -> None:
    """Let a table (rows, columns) pass.

    Raises:
        ValueError: for other numbers; says what came and what is expected.
    """
    if x.ndim == 2 and x.shape[1] == columns and rows in (None, len(x)):
        return
    raise ValueError(
        f"{owner}: got a tensor of shape {tuple(x.shape)}, expected "
        f"({'n' if rows is None else rows}, {columns})."
    )


def expect_divisible(owner: str, size: Sequence[int], by: Sequence[int]) -> None:
    """Let sizes pass that are whole multiples of others, axis by axis.

    Raises:
        ValueError: for a remainder; names the sizes.
    """
    if len(size) != len(by) or any(n % k for n, k in zip(size, by, strict=True)):
        raise ValueError(f"{owner}: a size of {tuple(size)} is no multiple of {tuple(by)}.")
