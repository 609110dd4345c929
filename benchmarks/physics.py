"""The physics: the residual's time, exactness and memory beside plain forms, and its share of a step.

    OMP_NUM_THREADS=1 python benchmarks/physics.py                         # everything, twenty minutes
    OMP_NUM_THREADS=1 python benchmarks/physics.py --part residual --points 2048 --widths 64 --depths 4
    OMP_NUM_THREADS=1 python benchmarks/physics.py --part step --base physics.width=64 physics.points=256
    python benchmarks/physics.py --device cuda

Parts: `residual`, loss and gradients of a flow network of 8 candidates in five forms; `difference`
is the largest of loss and gradients to the plain form, relative to each one's largest number:

- fast: the fused sweep of training (`fused_sum`), in chunks of points;
- jets: the same formulas through autograd (`JetMLP`), which any loss can be put on;
- plain: nested differentiation in 13 backward passes, the code's part of the first layer once per candidate;
- joined: the same with the code appended to the coordinates of every point, as is usual;
- floor: 5 x forward and backward of the network's values, as five numbers per unit are computed.

`memory`: what a form needs at its peak above weights and points, in a process of its own (Linux). `step`: a
training step of the configured expert with and without its physics head, on vessels with flow in all of them.
All forms take turns; times are the shortest of all rounds, on the CPU in CPU seconds. At width 256 and 8192
points the plain forms take 10 GB. Needs `pip install aneurysm[bench]`.
"""

import argparse
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from nets_measure import Times, in_turns
from physics_forms import FAST, FLOOR, JETS, JOINED, PLAIN, Case, Problem, peak
from physics_step import candidates, configured, head_alone, made, soap_alone, training_step

PARTS = ("residual", "memory", "step")
TARGETS = "plain / fast >= 5, fast / floor <= 1.5, memory fast / plain <= 0.1, physics <= 30 % of a step"
ARMS = {
    "none": ["physics=none"],
    "SOAP": ["physics=navier_stokes", "expert.physics_optimiser=soap"],
    "AdamW": ["physics=navier_stokes", "expert.physics_optimiser=adamw"],
}


def main() -> None:
    """Measure and print one table per part."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--points", nargs="+", type=int, default=[2048, 8192], help="of all candidates")
    parser.add_argument("--widths", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--depths", nargs="+", type=int, default=[4, 6])
    parser.add_argument("--rounds", type=int, default=5, help="four times as many for `step`")
    parser.add_argument("--base", nargs="*", default=[], help="overrides of train.py, for `step`")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    torch.set_num_threads(1)
    sizes = [(n, w, d) for n in given.points for w in given.widths for d in given.depths]
    cases = [Case(*size, device=given.device) for size in sizes]
    # One size more in single precision, and with the other ways in which a code acts.
    last = (given.points[0], given.widths[-1], given.depths[0])
    cases += [Case(*last, dtype="float32", device=given.device)]
    cases += [Case(*last, conditioning=kind, device=given.device) for kind in ("film", "hypernetwork")]
    print(f"Targets: {TARGETS}.")
    if "residual" in given.part:
        residuals(cases, given.rounds)
    if "memory" in given.part:
        memories(cases)
    if "step" in given.part:
        steps(given.base, 4 * given.rounds, given.device)


def residuals(cases: Sequence[Case], rounds: int) -> None:
    """Times and differences."""
    ratios = ("plain / fast", "joined / fast", "jets / fast", "fast / floor")
    header("network", "points", "fast, ms", *ratios, "difference")
    for case in cases:
        problem = Problem(case)
        apart = max(problem.apart(form) for form in (FAST, JETS))
        forms = {form: partial(problem.step, form) for form in problem.forms}
        seconds = shortest(in_turns(forms, rounds, case.device), case.device)
        fast = seconds[FAST]
        slower = [f"{seconds[form] / fast:.1f}" if form in seconds else "" for form in (PLAIN, JOINED, JETS)]
        row = (
            label(case),
            str(case.points),
            f"{1e3 * fast:.0f}",
            *slower,
            f"{fast / seconds[FLOOR] / 5:.2f}",
        )
        print(f"| {' | '.join(row)} | {apart:.0e} |", flush=True)


def memories(cases: Sequence[Case]) -> None:
    """Peaks."""
    header("network", "points", "fast, MiB", "jets, MiB", "plain, MiB", "fast / plain")
    for case in cases:
        peaks = {form: peak(case, form) / 2**20 for form in (FAST, JETS, PLAIN)}
        shown = " | ".join(f"{value:.0f}" for value in peaks.values())
        print(f"| {label(case)} | {case.points} | {shown} | {peaks[FAST] / peaks[PLAIN]:.3f} |", flush=True)


def steps(base: Sequence[str], rounds: int, device: str) -> None:
    """Training steps, and the head's part of them measured alone."""
    settings = {arm: configured([*base, *overrides]) for arm, overrides in ARMS.items()}
    modules = {arm: made(cfg).to(device) for arm, cfg in settings.items()}
    s = settings["none"].expert
    batch = candidates(int(s.batch), int(s.crop), device)
    sides = {arm: training_step(module, batch) for arm, module in modules.items()}
    alone = made(settings["SOAP"]).to(device)
    sides |= {"head": head_alone(alone, batch[0].flow), "ten steps of SOAP": soap_alone(alone)}
    seconds = shortest(in_turns(sides, rounds, device), device)
    print(f"\nA training step of {s.batch} candidates of {s.crop}^3 voxels")
    header("physics", "step, ms", "physics' share")
    for arm in ARMS:
        print(f"| {arm} | {1e3 * seconds[arm]:.0f} | {1 - seconds['none'] / seconds[arm]:.1%} |")
    head, soap = seconds["head"], seconds["ten steps of SOAP"] / 10
    print(
        f"\nAlone: the head's forward and backward pass {1e3 * head:.1f} ms, a step of SOAP {1e3 * soap:.1f} "
        f"ms, together {(head + soap) / (head + soap + seconds['none']):.1%}"
    )


def header(*columns: str) -> None:
    """The first two lines of a table."""
    print(f"\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")


def shortest(times: Mapping[str, Times], device: str) -> dict[str, float]:
    """Seconds of every side's best round: of the CPU where that is what works, else of the clock."""
    return {name: min(one.cpu if device == "cpu" else one.wall) for name, one in times.items()}


def label(case: Case) -> str:
    """Width x depth, and what is not as usual."""
    more = [case.conditioning] * (case.conditioning != "shift") + ["FP32"] * (case.dtype == "float32")
    return ", ".join([f"{case.width} x {case.depth}", *more])


if __name__ == "__main__":
    main()
