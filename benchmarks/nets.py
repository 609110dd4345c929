"""The networks: time and memory against straightforward restatements, and against MONAI's SwinUNETR.

    python benchmarks/nets.py                                   # everything on two threads: an hour
    python benchmarks/nets.py --part encoder --sizes 64 --only here plain
    python benchmarks/nets.py --part oscillator --dims 4 --steps 1 4 16
    python benchmarks/nets.py --part nets --sizes 64 --only waveformer SwinUNETR
    python benchmarks/nets.py --part profile --sizes 64
    python benchmarks/nets.py --device cuda --sizes 96 128      # bf16 autocast

Parts: `encoder`, the WaveFormer encoder beside its restatement (`nets_plain.py`: the same weights, and the
same numbers, which is checked first) and the encoder of SwinUNETR; `oscillator`, a Kuramoto step beside its
coupling alone; `nets`, whole segmenters of `conf/segmenter`; `profile`, the operators of an encoder's step.
One volume per batch. Times: rounds in one process in which all sides take turns; the ratios are medians over
the rounds, in brackets that of the fastest rounds; with `--threads 1` they are of CPU seconds, which a busy
machine lengthens least. Memory: see `nets_measure.py`. Needs `pip install
aneurysm[bench]`, and Linux for peak memory on a CPU.
"""

import argparse
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from nets_cases import CONFIGS, PLAIN, PRODUCT, Case, check, encoders, made, run, segmenters
from nets_measure import Times, cpu_ratio, in_turns, memory, ratio
from nets_oscillators import lines, rows, tables
from torch.profiler import ProfilerActivity, profile

TARGET_TIME, TARGET_MEMORY = (
    1.5,
    0.6,
)  # of the encoder: restatement / here at least, here / restatement at most
PARTS = ("profile", "encoder", "oscillator", "nets")
MODES = {False: "forward", True: "forward + backward"}


def main() -> None:
    """Measure and print one table per part."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--sizes", nargs="+", type=int, help="voxels per axis; 64 96, on a GPU 96 128")
    parser.add_argument("--configs", nargs="+", choices=list(CONFIGS), default=list(CONFIGS))
    parser.add_argument("--only", nargs="+", help="networks by the names in the tables; all when left out")
    parser.add_argument("--dims", nargs="+", type=int, default=[2, 4, 8, 16, 32], help="oscillator_dim")
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 2, 4, 8, 16], help="T")
    parser.add_argument("--repeats", type=int, default=5, help="rounds; five times as many for oscillators")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="autocast; always on a GPU")
    parser.add_argument("--no-memory", action="store_true", help="times only")
    parser.add_argument("--json", type=Path, help="also write every figure here")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    logging.getLogger("aneurysm").setLevel(logging.WARNING)
    cuda = given.device.startswith("cuda")
    sizes = given.sizes or ([96, 128] if cuda else [64, 96])
    options: dict[str, Any] = {"device": given.device, "bf16": given.bf16 or cuda}
    where = torch.cuda.get_device_name() if cuda else f"{given.threads} threads"
    arithmetic = "bf16 autocast" if options["bf16"] else "float32"
    print(f"torch {torch.__version__}, {where}, {arithmetic}; load {os.getloadavg()[0]:.1f} at the start")
    results: dict[str, Any] = {"torch": torch.__version__, "where": where, "sizes": sizes, **options}
    memory_threads = None if given.no_memory else given.threads
    for part in given.part:
        print(f"\n## {part}\n", flush=True)
        if part == "profile":
            results[part] = {
                size: operators(Case("encoder", "paper", PRODUCT, size, **options)) for size in sizes[:1]
            }
        elif part == "oscillator":
            found = rows(given.dims, given.steps, 5 * given.repeats, given.device)
            results[part] = {"settings": found, "lines": lines(found)}
            print(tables(found), flush=True)
        else:
            results[part] = []
            for size in sizes:
                for config in given.configs if part == "encoder" else ("",):
                    names = encoders(config) if part == "encoder" else segmenters()
                    cases = [
                        Case(part, config, name, size, **options)
                        for name in names
                        if not given.only or name in given.only
                    ]
                    if not cases:
                        parser.error(f"--only names none of the networks: {', '.join(names)}")
                    results[part] += compared(cases, given.repeats, memory_threads)
    if given.json:
        given.json.write_text(json.dumps(results, indent=1))


def compared(cases: Sequence[Case], rounds: int, memory_threads: int | None) -> list[dict[str, Any]]:
    """Figures of all sides of a comparison, in both modes; prints their table."""
    first = cases[0]
    nets = {case.side: made(case) for case in cases}
    title = f"{first.part} {first.config}".strip()
    print(f"### {title}, {first.size}^3\n")
    if PRODUCT in nets and PLAIN in nets:
        apart, slopes = in_float32(first, nets)
        print(f"Same numbers: maps differ by {apart:.0e} at most, gradients by {slopes:.0e} of their size.\n")
    found = []
    print(
        "| network | parameters, M | what | s | fastest | / first (fastest) | CPU / first "
        "| peak MiB | / first | saved MiB | / first |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for backward in MODES:
        asked = [Case(**{**case.words(), "backward": backward}) for case in cases]
        for net, _ in nets.values():
            net.train(backward)
        times = in_turns(
            {case.side: (lambda case=case: run(case, *nets[case.side])) for case in asked},
            rounds,
            first.device,
        )
        kept = {case.side: memory(case, memory_threads) for case in asked} if memory_threads else {}
        for case in asked:
            found.append(row(case, nets[case.side][0], times, kept))
            print(written(found[-1]), flush=True)
    print(flush=True)
    if PRODUCT in nets and PLAIN in nets:
        print(against_targets(found), flush=True)
    return found


def in_float32(first: Case, nets: Mapping[str, Any]) -> tuple[float, float]:
    """`check` without the shortened arithmetic of a GPU."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        return check(nets[PRODUCT][0], nets[PLAIN][0], nets[PRODUCT][1])
    finally:
        torch.backends.cudnn.allow_tf32 = before


def row(
    case: Case, net: torch.nn.Module, times: Mapping[str, Times], kept: Mapping[str, Any]
) -> dict[str, Any]:
    """All figures of one side in one mode; ratios are to the first side."""
    own, first = times[case.side], next(iter(times.values()))
    found = {
        **case.words(),
        "parameters": sum(p.numel() for p in net.parameters()),
        "seconds": own.median,
        "fastest": own.best,
        "ratio": ratio(own, first),
        "fastest_ratio": own.best / first.best,
        "cpu_ratio": cpu_ratio(own, first),
    }
    if kept:
        base = next(iter(kept.values()))
        for figure in ("peak", "saved"):
            found[figure] = kept[case.side][figure]
            found[f"{figure}_ratio"] = found[figure] / base[figure] if base[figure] else None
    return found


def written(r: Mapping[str, Any]) -> str:
    """A row of the table."""

    def mebibytes(figure: str) -> str:
        if not r.get(figure):
            return " | "
        return f"{r[figure] / 2**20:.0f} | {r[f'{figure}_ratio']:.2f}"

    return (
        f"| {r['side']} | {r['parameters'] / 1e6:.2f} | {MODES[r['backward']]} | {r['seconds']:.3f} "
        f"| {r['fastest']:.3f} | {r['ratio']:.2f} ({r['fastest_ratio']:.2f}) | {r['cpu_ratio']:.2f} "
        f"| {mebibytes('peak')} | {mebibytes('saved')} |"
    )


def against_targets(found: Sequence[Mapping[str, Any]]) -> str:
    """How the encoder stands to what was asked of it."""
    said = []
    for r in found:
        if r["side"] != PLAIN:
            continue
        words = f"{r['ratio']:.2f} times faster than plain ({r['fastest_ratio']:.2f} in the fastest rounds)"
        if r.get("peak"):
            words += f", {1 / r['peak_ratio']:.2f} of its memory"
        said.append(f"{MODES[r['backward']]}: {words}")
    return f"{'; '.join(said)}. Asked for: {TARGET_TIME} and {TARGET_MEMORY}.\n"


def operators(case: Case, top: int = 15) -> list[dict[str, Any]]:
    """The costliest operators of one step of a network, by their own time; prints their table."""
    net, image = made(case)
    cuda = case.device.startswith("cuda")
    run(case, net, image)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as seen:
        run(case, net, image)
    entry = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = sorted(seen.key_averages(), key=lambda e: getattr(e, entry), reverse=True)
    total = sum(getattr(e, entry) for e in events)
    print(
        f"{MODES[case.backward]} of the {case.config} encoder at {case.size}^3: "
        f"{total / 1e3:.0f} ms of operators\n"
    )
    print("| operator | own ms | share | calls |")
    print("|---|---|---|---|")
    found = []
    for e in events[:top]:
        own = getattr(e, entry)
        found.append({"operator": e.key, "ms": own / 1e3, "share": own / total, "calls": e.count})
        print(f"| {e.key} | {own / 1e3:.1f} | {own / total:.1%} | {e.count} |")
    return found


if __name__ == "__main__":
    main()
