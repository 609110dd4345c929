"""The networks that `nets.py` measures, by name, and the check that restatements give the same numbers."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import hydra
import torch
from monai.networks.nets.swin_unetr import SwinUNETR
from nets_plain import PlainEncoder
from torch import Tensor, nn

from aneurysm.build import build_segmenter
from aneurysm.command_line import config_folder
from aneurysm.nets.waveformer import WaveFormerEncoder

PRODUCT, PLAIN, SWIN = "here", "plain", "SwinUNETR"
PAPER: dict[str, Any] = {
    "width": 48, "depths": (2, 2, 2, 2), "heads": (3, 6, 12, 24), "levels": (3, 2, 1, 0), "mlp_ratio": 4.0
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "paper": PAPER,
    "paper, multi-scale": {**PAPER, "multi_scale": True},
    "demo": {
        "width": 16, "depths": (1, 1, 1, 1), "heads": (2, 4, 8, 8), "levels": (2, 1, 1, 0), "mlp_ratio": 2.0
    },
}  # fmt: skip
# As the paper has it: the low band with its gain, and every level however small the crop.
AS_PUBLISHED: dict[str, Any] = {"normalise_lf": False, "min_window": 1}


@dataclass(frozen=True)
class Case:
    """One network at one input size, rebuilt from its description in a process of its own."""

    part: str  # "encoder" or "nets"
    config: str  # of the encoders, one of CONFIGS
    side: str  # which network
    size: int  # voxels per axis of the input
    backward: bool = True
    device: str = "cpu"
    bf16: bool = False

    def words(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class SwinEncoder(nn.Module):
    """MONAI's Swin transformer as SwinUNETR calls it: five maps of strides 2 to 32."""

    def __init__(self) -> None:
        super().__init__()
        self.swin = SwinUNETR(1, 1, feature_size=48).swinViT

    def forward(self, image: Tensor) -> list[Tensor]:
        return self.swin(image, normalize=True)


def product_encoder(config: str) -> WaveFormerEncoder:
    """The encoder of `aneurysm.nets`; weights that start at zero get values, so that all are compared."""
    torch.manual_seed(0)
    net = WaveFormerEncoder(1, **CONFIGS[config], **AS_PUBLISHED)
    with torch.no_grad():
        for p in net.parameters():
            if not p.any():
                p.normal_(std=0.1)
    return net


def plain_encoder(config: str) -> PlainEncoder:
    """The restatement with the weights of `product_encoder`."""
    net = PlainEncoder(**CONFIGS[config])
    net.take(product_encoder(config).state_dict())
    return net


def encoders(config: str) -> dict[str, Callable[[], nn.Module]]:
    """Sides of the encoder part; the peer only at the paper's width, which it shares."""
    sides: dict[str, Callable[[], nn.Module]] = {
        PRODUCT: lambda: product_encoder(config),
        PLAIN: lambda: plain_encoder(config),
    }
    return sides | {SWIN: SwinEncoder} if config == "paper" else sides


def segmenters() -> dict[str, Callable[[], nn.Module]]:
    """Every `conf/segmenter` as its stage builds it, without refinement, and MONAI's SwinUNETR."""

    def configured(name: str) -> nn.Module:
        with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
            wanted = [f"segmenter@smart_net.net={name}", "smart_net.refine=false"]
            return build_segmenter(hydra.compose("train", overrides=wanted))

    names = sorted(path.stem for path in (config_folder() / "segmenter").glob("*.yaml"))
    nets: dict[str, Callable[[], nn.Module]] = {name: partial(configured, name) for name in names}
    return {**nets, SWIN: partial(SwinUNETR, 2, 2, feature_size=48)}


def made(case: Case) -> tuple[nn.Module, Tensor]:
    """The network of a case, and its input: one volume of noise."""
    sides = encoders(case.config) if case.part == "encoder" else segmenters()
    net = sides[case.side]().to(case.device).train(case.backward)
    torch.manual_seed(1)
    image = torch.randn(1, 1 if case.part == "encoder" else 2, *[case.size] * 3)
    return net, image.to(case.device)


def run(case: Case, net: nn.Module, image: Tensor) -> None:
    """Forward without gradients, or forward and backward with fresh gradients."""
    net.zero_grad(set_to_none=True)
    device = torch.device(case.device).type
    with torch.set_grad_enabled(case.backward):
        with torch.autocast(device, torch.bfloat16, enabled=case.bf16):
            loss = mean_square(net(image))
        if case.backward:
            loss.backward()


def mean_square(answer: Any) -> Tensor:
    """Something to differentiate: mean squares of the maps, added."""
    maps = answer if isinstance(answer, list | tuple) else [answer]
    return torch.stack([m.float().square().mean() for m in maps]).sum()


def check(product: nn.Module, plain: nn.Module, image: Tensor) -> tuple[float, float]:
    """Largest difference of the maps (of unit scale) and of the gradients (to the largest of a weight's).

    Raises RuntimeError when it is more than float32 rounding, as then the timing would compare two things.
    """
    maps, gradients = [], []
    for net in (product, plain):
        net.zero_grad(set_to_none=True)
        answer = net(image)
        # weights differ by map and place, or the layer norm at the end would hide the scale
        ramps = [torch.linspace(0, 1, m.numel(), device=m.device).reshape(m.shape) for m in answer]
        torch.stack([(m * r).mean() for m, r in zip(answer, ramps, strict=True)]).sum().backward()
        maps.append([m.detach() for m in answer])
        # one number per weight: the same order in both, whatever a weight is called or how it is laid out
        gradients.append(sorted(float(p.grad.norm()) for p in net.parameters() if p.grad is not None))
        net.zero_grad(set_to_none=True)
    apart = max(float((a - b).abs().max()) for a, b in zip(*maps, strict=True))
    slopes = max(abs(a - b) / max(a, b, 1e-12) for a, b in zip(*gradients, strict=True))
    if apart > 1e-4 or slopes > 5e-3:
        raise RuntimeError(
            f"The restatement is another network: maps differ by {apart:.1e}, gradients by {slopes:.1e}."
        )
    return apart, slopes
