"""The loss of a flow network in several forms that give the same numbers: what `physics.py` compares.

As a command: python benchmarks/physics_forms.py '<case and form as JSON>' prints the bytes that one form
needs at its peak, for `peak` below.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from nets_measure import resident, synchronise
from torch import Tensor
from torch.nn.functional import linear

from aneurysm.physics.fused_loss import fused_sum
from aneurysm.physics.jet_mlp import JetMLP
from aneurysm.physics.jets import gradient, recorded_jet
from aneurysm.physics.navier_stokes import navier_stokes_residual

FAST, JETS, PLAIN, JOINED, FLOOR = "fast", "jets", "plain", "joined", "floor"
CANDIDATES = 8


@dataclass(frozen=True)
class Case:
    """A flow network of 8 candidates and how many points it is tested at, of all together."""

    points: int
    width: int
    depth: int
    conditioning: str = "shift"
    dtype: str = "float64"
    device: str = "cpu"
    latent: int = 16


class Problem:
    """A case with weights and points drawn: mean squared residual, as a function of weights and codes."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        net = JetMLP(case.latent, case.width, case.depth, dtype=case.dtype, conditioning=case.conditioning)
        self.net, self.case, draws = net.to(case.device), case, {"dtype": net.dtype, "device": case.device}
        self.code = torch.randn(CANDIDATES, case.latent, **draws).requires_grad_()
        self.points = torch.rand(CANDIDATES, case.points // CANDIDATES, 3, **draws) * 2 - 1
        self.reynolds = torch.linspace(20, 120, CANDIDATES, **draws)
        values = self.split if case.conditioning == "shift" else self.layered
        self.forms: dict[str, Callable[[], Tensor]] = {
            FAST: lambda: fused_sum(self.net, self.code, self.points, self.loss),
            JETS: lambda: self.loss(self.net(self.points, self.code)),
            PLAIN: lambda: self.nested(values),
            FLOOR: lambda: values(self.points).square().sum(),
        }
        if case.conditioning == "shift":
            self.forms[JOINED] = lambda: self.nested(self.joined)

    def step(self, form: str) -> Tensor:
        """The loss, and the gradients in place."""
        self.net.zero_grad(set_to_none=True)
        self.code.grad = None
        loss = self.forms[form]()
        loss.backward()
        return loss.detach()

    def numbers(self, form: str) -> list[Tensor]:
        """The loss and all gradients."""
        loss = self.step(form)
        return [loss, *(p.grad for p in (self.code, *self.net.parameters()) if p.grad is not None)]

    def apart(self, form: str) -> float:
        """Largest difference of a form's loss and gradients to the plain form's, in the largest of each."""
        pairs = zip(self.numbers(form), self.numbers(PLAIN), strict=True)
        return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)

    def loss(self, jet: Tensor, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
        """Of the network's jets (5, b, n, 4), of which only the pressure's gradient is looked at."""
        mass, force = navier_stokes_residual(jet[..., :3], jet[..., 3], self.reynolds[rows])
        return (mass.square().sum() + force.square().sum()) / self.case.points

    def nested(self, network: Callable[[Tensor], Tensor]) -> Tensor:
        """By 13 backward passes: 4 first derivatives, 9 second ones."""
        x = self.points.clone().requires_grad_()
        flow = network(x)
        push = gradient(flow[..., 3], x).movedim(-1, 0)
        velocity, pressure = recorded_jet(flow[..., :3], x), torch.cat((flow[None, ..., 3], push))
        mass, force = navier_stokes_residual(velocity, pressure, self.reynolds)
        return (mass.square().sum() + force.square().sum()) / self.case.points

    def split(self, x: Tensor) -> Tensor:
        """The code's part of the first layer once per candidate."""
        return self._above(self.net.position(x) + self.net.latent(self.code)[:, None])

    def joined(self, x: Tensor) -> Tensor:
        """The code appended to the coordinates of every point."""
        net, code = self.net, self.code[:, None].expand(-1, x.shape[1], -1)
        matrix = torch.cat((net.position.weight, net.latent.weight), dim=1)
        return self._above(linear(torch.cat((x, code), dim=-1), matrix, net.position.bias))

    def layered(self, x: Tensor) -> Tensor:
        """Any conditioning."""
        *hidden, readout = self.net.layers(self.code)
        for layer in hidden:
            x = (layer.linear(x) + layer.shift).tanh()
        return readout.linear(x) + readout.shift

    def _above(self, below: Tensor) -> Tensor:
        for layer in self.net.hidden:
            below = layer(below.tanh())
        return self.net.readout(below.tanh())


def peak(case: Case, form: str) -> int:
    """Bytes above what weights and points take: on the CPU from a fresh process, on a GPU its allocator's."""
    if case.device.startswith("cuda"):
        return measured_peak(case, form)
    # Freed tensors go back to the system at once, so that the high-water mark follows what is alive.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, json.dumps({**asdict(case), "form": form})]
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    if child.returncode:
        raise RuntimeError(f"{form} of {case} could not be measured:\n{child.stderr[-2000:]}")
    return int(child.stdout.splitlines()[-1])


def measured_peak(case: Case, form: str) -> int:
    """`peak` in this process."""
    Problem(Case(8 * CANDIDATES, 8, 2, case.conditioning, case.dtype, case.device)).step(form)
    problem = Problem(case)
    if case.device.startswith("cuda"):
        synchronise(case.device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        problem.step(form)
        synchronise(case.device)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
    before = resident("VmRSS")
    problem.step(form)
    return resident("VmHWM") - before


if __name__ == "__main__":
    torch.set_num_threads(1)
    asked = json.loads(sys.argv[1])
    chosen = asked.pop("form")
    print(measured_peak(Case(**asked), chosen))
