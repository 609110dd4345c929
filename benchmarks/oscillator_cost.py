"""What the oscillators of an expert cost: a training step and the memory it keeps, beside none.

    python benchmarks/oscillator_cost.py                                   # the demo's expert, two minutes
    python benchmarks/oscillator_cost.py --arms oscillator_dim=8 oscillator.recompute=true oscillator=itrsa
    python benchmarks/oscillator_cost.py --base experiment=rsna_full data.root=x --batch 4

Every arm is an override of `train.py`; all train on the same random candidates (crop and batch of the
configuration), without the flow, and take turns step by step. The ratio is the median over rounds of CPU
time here over CPU time without oscillators; `kept` is what a step keeps for its backward pass. Whether they
are worth it is a matter of a sweep: `python train.py -m experiment=sweep_oscillator`, then
`python -m aneurysm.compare`.
"""

import argparse

import hydra
import torch
from nets_measure import Times, cpu_ratio, in_turns, saved_bytes
from torch import Tensor, nn

from aneurysm.build import build_expert
from aneurysm.command_line import config_folder
from aneurysm.nets.expert import ExpertBatch

ARMS = (
    "oscillator=itrsa",
    *(f"oscillator_dim={n}" for n in (2, 4, 8, 16, 32)),
    *(f"oscillator.steps={steps}" for steps in (1, 8, 16)),
    "oscillator.placement=before_mlp",
    "oscillator.placement=in_attention",
    "oscillator.connectivity=conv",
    "oscillator.recompute=true",
)
NONE = "oscillator=none"


class Step(nn.Module):
    """An expert on candidates that differ by their image alone."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, image: Tensor) -> Tensor:
        b = len(image)
        present = torch.eye(4, dtype=torch.bool)[torch.arange(b) % 4]
        ones = torch.ones(b)
        batch = ExpertBatch(
            image=image,
            present=present,
            vessel=torch.rand(b, 1, *image.shape[2:]),
            age=60 * ones,
            sex=0 * ones,
            position=torch.zeros(b, 3),
            graph=torch.zeros(b, 8),
            score=0.5 * ones,
        )
        out = self.net(batch)
        return torch.cat([out.logit, out.offset_mm.flatten(), out.mask_logit.mean()[None]])


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arms", nargs="+", default=list(ARMS), help="overrides, one per arm")
    parser.add_argument("--base", nargs="*", default=[], help="overrides of all arms")
    parser.add_argument("--batch", type=int, help="candidates; as configured when left out")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    nets: dict[str, Step] = {}
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        for arm in dict.fromkeys([NONE, *given.arms]):
            cfg = hydra.compose("train", overrides=[*given.base, "physics=none", arm])
            torch.manual_seed(0)
            nets[arm] = Step(build_expert(cfg, graph_features=8)).train()
    crop, batch = int(cfg.expert.crop), given.batch or int(cfg.expert.batch)
    image = torch.randn(batch, 4, crop, crop, crop)

    def step(net: Step) -> None:
        net.zero_grad(set_to_none=True)
        net(image).square().sum().backward()

    times: dict[str, Times] = in_turns(
        {arm: lambda net=net: step(net) for arm, net in nets.items()}, given.rounds
    )
    print(f"{batch} candidates of {crop}^3 voxels, {given.threads} thread(s)\n")
    print("| arm | parameters of the oscillators | ms per step | / none | kept, MiB |\n|---|---|---|---|---|")
    bare = sum(p.numel() for p in nets[NONE].parameters())
    for arm, net in nets.items():
        own = sum(p.numel() for p in net.parameters()) - bare
        share, kept = cpu_ratio(times[arm], times[NONE]), saved_bytes(net, image) / 2**20
        print(f"| {arm} | {own:,} | {1e3 * times[arm].best:.0f} | {share:.3f} | {kept:.1f} |", flush=True)


if __name__ == "__main__":
    main()
