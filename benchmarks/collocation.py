"""Where to test the physics: populations of collocation points at equal cost, error against steps.

    OMP_NUM_THREADS=1 python benchmarks/collocation.py                      # both flows: a quarter of an hour
    OMP_NUM_THREADS=1 python benchmarks/collocation.py --flows straight --seeds 0 --figure collocation.png

Every population sees the same number of points per step, and networks and fresh points of one seed are the
same for all. Fits are short, so that the differences still show. Prints a markdown table of the residual at
uniform points that no fit has seen and of the error in velocity where the flow is known, mean and standard
deviation over the seeds; `--figure` draws the residual over the steps, `--json` keeps all curves and reads
what an earlier run has kept.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import flow_cases
import numpy as np
import torch
from flow_cases import Case, Fitted
from torch import Tensor

from aneurysm.physics.fit import FitSettings
from aneurysm.physics.flow_field import FlowField
from aneurysm.physics.loss import FlowLoss
from aneurysm.report.style import CYCLE, dress, new_figure

FLOWS: dict[str, tuple[str, Callable[[], Case]]] = {
    "straight": ("straight tube", flow_cases.straight),
    "bend": ("bend", flow_cases.bend),
    "sac": ("tube with sac", flow_cases.sac),
}
KINDS: dict[str, dict[str, Any]] = {
    "uniform": {"sampler": "uniform"},
    "fixed": {"sampler": "fixed"},
    "r3, every 100": {"sampler": "r3"},
    "r3_paper, every step": {"sampler": "r3_paper"},
    "residual_weighted": {"sampler": "residual_weighted"},
    "r3 + wall quota": {"sampler": "r3", "wall_share": 0.2},
}
LOOKS = 6  # at a flow during a fit
Curve = list[tuple[int, float, float | None]]  # step, residual, error in velocity


def run(case: Case, seed: int) -> Curve:
    """Fit once and look at the flow on the way."""
    flow, curve = case.draw(2000, seed=5), []
    steps = case.fit.steps

    def watch(step: int, loss: FlowLoss, field: FlowField, code: Tensor) -> None:
        if (step + 1) % (steps // LOOKS):
            return
        fitted = Fitted(case, field, code, 0.0)
        own = fitted.loss(flow)
        error = None
        if case.truth is not None:
            x, velocity, _ = fitted.over(flow)
            truth = case.truth(x)[:, :3]
            error = float((velocity - truth).norm() / truth.norm())
        curve.append((step + 1, float(own.mass.mean() + own.force.mean()), error))

    flow_cases.fit_case(case, seed, watch)
    return curve


def spread(values: list[float], scale: float = 1.0) -> str:
    """Mean and standard deviation."""
    found = np.array(values) * scale
    return f"{found.mean():.3g} ± {found.std():.2g}"


def draw(curves: dict[str, dict[str, list[Curve]]], path: Path) -> None:
    """Residual over steps, geometric mean over seeds, one panel per flow."""
    figure = new_figure(5 * len(curves), 3.8)
    for axes, (flow, kinds) in zip(
        np.atleast_1d(figure.subplots(1, len(curves))), curves.items(), strict=True
    ):
        for colour, (kind, runs) in zip(CYCLE, kinds.items(), strict=False):
            steps = [point[0] for point in runs[0]]
            mean = np.exp(np.mean([[np.log(point[1]) for point in one] for one in runs], axis=0))
            axes.semilogy(steps, mean, color=colour, lw=1.4, label=kind)
        dress(axes, "steps", "residual at unseen uniform points", FLOWS[flow][0].capitalize())
        axes.legend(fontsize=7.5, frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Fit all, print the table, draw the curves."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--flows", nargs="+", choices=FLOWS, default=["straight", "bend"])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--points", type=int, default=256, help="per step")
    parser.add_argument("--figure", type=Path, help="where to write a PNG of the curves")
    parser.add_argument("--json", type=Path, help="file of curves to write and to go on from")
    given = parser.parse_args()
    torch.set_num_threads(1)
    kept: dict[str, Curve] = {}
    if given.json and given.json.exists():
        kept = json.loads(given.json.read_text())
    small = {"fit": FitSettings(given.steps, 1e-2), "points": given.points, "pool": 8192, "width": 32}
    plain = {"wall_share": 0.0, "dome_share": 0.0}
    curves: dict[str, dict[str, list[Curve]]] = {}
    print("| flow | points | residual, 1e-4 | velocity off by, % |\n|---|---|---|---|")
    for flow in given.flows:
        curves[flow] = {}
        for kind in given.kinds:
            runs = curves[flow][kind] = []
            for seed in given.seeds:
                key = f"{flow}/{kind}/{seed}/{given.steps}/{given.points}"
                if key not in kept:
                    kept[key] = run(replace(FLOWS[flow][1](), **(small | plain | KINDS[kind])), seed)
                    if given.json:
                        given.json.write_text(json.dumps(kept))
                runs.append(kept[key])
            residual = spread([one[-1][1] for one in runs], 1e4)
            errors = [one[-1][2] for one in runs]
            error = "" if None in errors else spread([e for e in errors if e is not None], 100)
            print(f"| {FLOWS[flow][0]} | {kind} | {residual} | {error} |", flush=True)
    if given.figure:
        draw(curves, given.figure)


if __name__ == "__main__":
    main()
