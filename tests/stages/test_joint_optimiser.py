"""Two optimisers behind one: the same steps as each by itself, and the same again after a checkpoint."""

import pytest
import torch
from torch import nn

from aneurysm.physics.soap import SOAP
from aneurysm.stages.joint_optimiser import JointOptimiser
from aneurysm.stages.step import adamw_one_cycle


def nets() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return nn.Linear(4, 3), nn.Linear(3, 2)


def train(first: nn.Module, second: nn.Module, optimisers, steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        for one in optimisers:
            one.zero_grad()
        second(first(x).tanh()).square().mean().backward()
        for one in optimisers:
            one.step()


def same(ours: tuple[nn.Module, nn.Module], others: tuple[nn.Module, nn.Module]) -> bool:
    pairs = zip(nn.ModuleList(ours).parameters(), nn.ModuleList(others).parameters(), strict=True)
    return all(torch.equal(mine, theirs) for mine, theirs in pairs)


def joint(first: nn.Module, second: nn.Module) -> JointOptimiser:
    return JointOptimiser([torch.optim.AdamW(first.parameters()), SOAP(second.parameters())])


def test_takes_the_steps_of_its_parts():
    (a, b), (c, d) = nets(), nets()
    train(a, b, [joint(a, b)], 15)
    train(c, d, [torch.optim.AdamW(c.parameters()), SOAP(d.parameters())], 15)
    assert same((a, b), (c, d))


def test_goes_on_after_a_checkpoint_as_if_nothing_had_happened(tmp_path):
    (a, b), (c, d) = nets(), nets()
    whole, half = joint(a, b), joint(c, d)
    train(a, b, [whole], 12)
    train(c, d, [half], 6)
    torch.save(half.state_dict(), tmp_path / "optimiser.pt")
    again = joint(c, d)
    again.load_state_dict(torch.load(tmp_path / "optimiser.pt", weights_only=True))
    train(c, d, [again], 6, start=6)
    assert same((a, b), (c, d))


def test_a_schedule_reaches_every_part():
    first, second = nets()
    part = SOAP(second.parameters(), lr=7e-3)
    made = adamw_one_cycle([*first.parameters(), *second.parameters()], 1e-3, 0.1, 100, {part: 7e-3})
    optimiser, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    owned = [p for group in optimiser.param_groups for p in group["params"]]
    assert len(owned) == len({id(p) for p in owned}) == 4  # everything once
    rates = []
    for _ in range(100):
        optimiser.step()
        rates.append(part.param_groups[0]["lr"])
        schedule.step()
    assert max(rates) == pytest.approx(7e-3, rel=1e-3) and rates[-1] < 1e-5
    assert optimiser.param_groups[0]["lr"] / part.param_groups[0]["lr"] == pytest.approx(1 / 7, rel=1e-6)


def test_refuses_the_state_of_other_optimisers():
    first, second = nets()
    single = torch.optim.AdamW(first.parameters())
    with pytest.raises(ValueError, match="1 optimisers and this run has 2"):
        joint(first, second).load_state_dict(single.state_dict())
