"""One feature map out of whichever of CTA, MRA, T1 and T2 a patient has.

Slots follow `labels.MODALITIES`. What lies in the slot of an absent modality is never read, so it may be
anything, NaN included. All fusions halve the resolution like the backbone's patch embedding, whose
pretrained weights `load_stem` copies in. A vessel probability, when given, is added through a stem that
starts at zero.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from aneurysm.data.labels import MODALITIES
from aneurysm.nets.no_effect import hold
from aneurysm.nets.shapes import expect_map, expect_rows

SLOTS = len(MODALITIES)


def _check(images: Tensor, present: Tensor) -> None:
    expect_map("Fusion (images)", images, SLOTS)
    expect_rows("Fusion (present)", present, SLOTS, len(images))
    empty = (~present.any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"Every sample needs at least one of {MODALITIES}, but rows {empty} of the batch have none. "
            "Drop these cases or mark the slot that holds their image as present."
        )


def _pad_to_even(volume: Float[Tensor, "b c d h w"]) -> Tensor:
    """Repeat the last plane of odd axes, so that a stride of two gives ceil(size / 2)."""
    d, h, w = (size % 2 for size in volume.shape[2:])
    return F.pad(volume, (0, w, 0, h, 0, d), mode="replicate") if d or h or w else volume


def _check_stem(state: Mapping[str, Tensor], width: int) -> None:
    expected = {"weight": (width, 1, 2, 2, 2), "bias": (width,)}
    found = {name: tuple(value.shape) for name, value in state.items()}
    if found != expected:
        raise ValueError(
            f"A stem is loaded from a Conv3d(1, {width}, 2, 2) with {expected}, but got {found}. "
            "Pass the patch embedding's state of a backbone of the same width."
        )


class VesselStem(nn.Module):
    """Adds the vessel probability to fused features; zero at the start, so pretrained features survive."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, width, 2, 2)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)  # pyright: ignore[reportArgumentType]

    def forward(
        self, fused: Float[Tensor, "b c p q r"], vessel: Float[Tensor, "b 1 d h w"] | None
    ) -> Float[Tensor, "b c p q r"]:
        """Fused features with the vessel's contribution; unchanged when there is no vessel map."""
        if vessel is None:
            return fused
        expect_map("VesselStem", vessel, 1)
        return fused + self.conv(_pad_to_even(vessel))


class ModalityStems(nn.Module):
    """A separate first convolution per modality, run only on the samples that have it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.stems = nn.ModuleList(nn.Conv3d(1, width, 2, 2) for _ in range(SLOTS))

    def forward(
        self, images: Float[Tensor, "b 4 d h w"], present: Bool[Tensor, "b 4"]
    ) -> list[tuple[Int[Tensor, "_"], Float[Tensor, "_ c p q r"]]]:
        """Per slot: the rows that have it and their feature maps.

        A modality that nobody in the batch has still runs, on zero samples: its gradient is then zero
        instead of missing, which distributed training would refuse.
        """
        _check(images, present)
        images = _pad_to_even(images)
        parts = []
        for slot, stem in enumerate(self.stems):
            rows = present[:, slot].nonzero().flatten()
            parts.append((rows, stem(images[rows, slot].unsqueeze(1))))
        return parts

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Start every modality from the same pretrained single-channel convolution."""
        _check_stem(state, self.width)
        for stem in self.stems:
            stem.load_state_dict(dict(state))


def _mean_over_present(
    parts: list[tuple[Tensor, Tensor]], present: Bool[Tensor, "b 4"]
) -> Float[Tensor, "b c p q r"]:
    maps = parts[0][1]
    total = maps.new_zeros(present.shape[0], *maps.shape[1:])
    for rows, part in parts:
        total = total.index_add(0, rows, part)
    return total / present.sum(1).to(total.dtype).view(-1, 1, 1, 1, 1)


class MeanFusion(nn.Module):
    """A stem per modality and the mean over those present: the simplest order-free fusion.

    Args:
        width: channels of the result.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stems = ModalityStems(width)
        self.vessel = VesselStem(width)

    def forward(
        self,
        images: Float[Tensor, "b 4 d h w"],
        present: Bool[Tensor, "b 4"],
        vessel: Float[Tensor, "b 1 d h w"] | None = None,
    ) -> Float[Tensor, "b c p q r"]:
        """(b, width, ceil(d/2), ceil(h/2), ceil(w/2)); raises ValueError for a row with nothing present."""
        return self.vessel(_mean_over_present(self.stems(images, present), present), vessel)

    def load_stem(self, state: Mapping[str, Tensor]) -> None:
        """Copy a pretrained Conv3d(1, width, 2, 2) (`weight`, `bias`) into the stem of every modality."""
        self.stems.load(state)


class EarlyFusion(nn.Module):
    """All modalities and their presence stacked as channels of one convolution.

    After `load_stem` a single modality gives exactly the pretrained embedding; several add up.

    Args:
        width: channels of the result.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.conv = nn.Conv3d(2 * SLOTS, width, 2, 2)
        self.vessel = VesselStem(width)

    def forward(
        self,
        images: Float[Tensor, "b 4 d h w"],
        present: Bool[Tensor, "b 4"],
        vessel: Float[Tensor, "b 1 d h w"] | None = None,
    ) -> Float[Tensor, "b c p q r"]:
        """(b, width, ceil(d/2), ceil(h/2), ceil(w/2)); raises ValueError for a row with nothing present."""
        _check(images, present)
        mask = present.view(-1, SLOTS, 1, 1, 1)
        # where, not a product: 0 * NaN is NaN
        images = torch.where(mask, images, torch.zeros((), dtype=images.dtype, device=images.device))
        stacked = torch.cat((images, mask.expand_as(images).to(images.dtype)), dim=1)
        return self.vessel(self.conv(_pad_to_even(stacked)), vessel)

    def load_stem(self, state: Mapping[str, Tensor]) -> None:
        """Copy a pretrained Conv3d(1, width, 2, 2) (`weight`, `bias`) to every image channel."""
        _check_stem(state, self.width)
        with torch.no_grad():
            self.conv.weight.zero_()
            self.conv.weight[:, :SLOTS] = state["weight"]
            self.conv.bias.copy_(state["bias"])  # pyright: ignore[reportOptionalMemberAccess]


class CrossAttentionFusion(nn.Module):
    """Every modality asks the others what they see, then the answers are averaged over those present.

    Stems per modality are pooled to tokens; the tokens of each present modality query those of the other
    present ones and a learned null token, which is always visible: a patient with one modality attends to
    it alone. The answer is upsampled and added through a per-channel gate that starts at zero, so training
    starts from `MeanFusion`. Upsampling and gate are linear, so one upsampled mean serves all slots.

    Args:
        width: channels of the result, a multiple of `heads`.
        heads: of the attention.
        token_grid: largest (d, h, w) of the token field per modality.
    """

    def __init__(self, width: int, heads: int = 4, token_grid: Sequence[int] = (4, 4, 4)) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(
                f"width {width} is not a multiple of heads {heads}. Choose heads that divide it."
            )
        self.width, self.heads = width, heads
        self.token_grid = tuple(int(side) for side in token_grid)
        self.stems = ModalityStems(width)
        self.vessel = VesselStem(width)
        self.norm = nn.LayerNorm(width)
        self.slot = nn.Parameter(torch.randn(SLOTS, 1, width) * 0.02)
        self.null = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.position = nn.Linear(12, width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        hold(self.key_value.bias, 0, width)  # of the keys
        self.out = nn.Linear(width, width)
        self.gate = nn.Parameter(torch.zeros(width))

    def forward(
        self,
        images: Float[Tensor, "b 4 d h w"],
        present: Bool[Tensor, "b 4"],
        vessel: Float[Tensor, "b 1 d h w"] | None = None,
    ) -> Float[Tensor, "b c p q r"]:
        """(b, width, ceil(d/2), ceil(h/2), ceil(w/2)); raises ValueError for a row with nothing present."""
        parts = self.stems(images, present)
        fused = _mean_over_present(parts, present)
        size = fused.shape[2:]
        d, h, w = (min(n, side) for n, side in zip(size, self.token_grid, strict=True))
        grid = (d, h, w)
        answer = self._exchange(parts, present, grid).transpose(1, 2).unflatten(2, grid)  # (b, width, *grid)
        answer = F.interpolate(answer, size, mode="trilinear", align_corners=False)
        return self.vessel(fused + self.gate.view(-1, 1, 1, 1).to(fused.dtype) * answer, vessel)

    def load_stem(self, state: Mapping[str, Tensor]) -> None:
        """Copy a pretrained Conv3d(1, width, 2, 2) (`weight`, `bias`) into the stem of every modality."""
        self.stems.load(state)

    def _exchange(
        self, parts: list[tuple[Tensor, Tensor]], present: Bool[Tensor, "b 4"], grid: tuple[int, int, int]
    ) -> Float[Tensor, "b n c"]:
        """Mean over the present modalities of what each learned from the others."""
        b, n = present.shape[0], math.prod(grid)
        slots = []
        for rows, maps in parts:
            pooled = F.adaptive_avg_pool3d(maps, grid).flatten(2).transpose(1, 2)  # (rows, n, c)
            slots.append(pooled.new_zeros(b, n, self.width).index_add(0, rows, pooled))
        tokens = self.norm(torch.stack(slots, dim=1))  # (b, 4, n, c)
        tokens = tokens + self.slot + self.position(_fourier(grid, tokens))
        tokens = tokens.flatten(1, 2)  # (b, 4n, c)
        keys = torch.cat((tokens, self.null.to(tokens.dtype).expand(b, -1, -1)), dim=1)  # (b, 4n + 1, c)
        q = self.query(tokens).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (b, heads, 4n, c/heads)
        k, v = self.key_value(keys).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        slot_of = torch.arange(SLOTS, device=present.device).repeat_interleave(n)
        visible = (slot_of[:, None] != slot_of[None, :]) & present[:, slot_of][:, None, :]  # (b, 4n, 4n)
        visible = F.pad(visible, (0, 1), value=True)[:, None]  # the null token
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        mixed = self.out(mixed.transpose(1, 2).flatten(2)).unflatten(1, (SLOTS, n))  # (b, 4, n, c)
        weight = present.to(mixed.dtype) / present.sum(1, keepdim=True)
        return (mixed * weight[:, :, None, None]).sum(1)


def _fourier(grid: Sequence[int], like: Tensor) -> Float[Tensor, "n 12"]:
    """Sines and cosines of a cell's place in the field, one and two half-waves per axis."""
    axes = [(torch.arange(size, device=like.device, dtype=torch.float32) + 0.5) / size for size in grid]
    place = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)  # (n, 3) in (0, 1)
    phase = torch.cat((math.pi * place, 2 * math.pi * place), dim=1)
    return torch.cat((phase.sin(), phase.cos()), dim=1).to(like.dtype)
