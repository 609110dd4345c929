"""Several processes that train together do what one process does with their whole batch."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import hydra
import numpy as np
import pandas as pd
import psutil
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from aneurysm.command_line import config_folder
from aneurysm.data.errors import UserError
from aneurysm.experiment import open_experiment
from aneurysm.global_batch import gather, over_all_processes, rand_rows, total
from aneurysm.nets.expert import RunningScale
from aneurysm.runs.launch import to_be_launched
from aneurysm.runs.metrics import read_metrics
from aneurysm.runs.settings import stage_key
from aneurysm.stages.processes import anywhere, from_first, gathered, gathered_by_first, shared
from aneurysm.train import train

ROOT = Path(__file__).parents[2]
TWO = ("trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu", "trainer.workers=0")
SMALL = ("data.patients=4", "data.size=44", "stage=pretrain", "fold=0")
# Float32 gradients of two halves differ from those of the whole by rounding, about 1e-7 of their size. The
# learning rate of 1e-3 turns that into 1e-8 per step, except where a gradient is nearly zero: Adam divides
# by its size. 1e-5 is a hundredth of what one step moves a weight by.
TOLERANCE = 1e-5


def compose(outputs, *overrides):
    fixed = [f"paths.outputs={outputs}", "experiment=smoke", "trainer.progress=none"]
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        return hydra.compose("train", overrides=[*fixed, *overrides])


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def start(outputs, *arguments, **options):
    fixed = [f"paths.outputs={outputs}", "experiment=smoke", "trainer.progress=none"]
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *arguments, *fixed],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
        **options,
    )


def state(folder):
    return torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]


def largest_difference(one, other):
    """Over all weights and buffers, with the name of the worst."""
    assert one.keys() == other.keys()
    differences = {
        name: float((one[name].double() - other[name].double()).abs().max())
        for name in one
        if isinstance(one[name], torch.Tensor) and one[name].numel()
    }
    worst = max(differences, key=differences.__getitem__)
    return differences[worst], worst


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Data of four patients, prepared."""
    folder = tmp_path_factory.mktemp("outputs")
    open_experiment(compose(folder, *SMALL))
    return folder


@pytest.mark.slow
def test_a_sweep_of_two_processes_per_job_equals_one_with_twice_the_batch(outputs):
    twenty = (*SMALL, "pretrain.steps=10", "pretrain.epochs=2")
    process = start(outputs, "-m", *twenty, *TWO, "seed=3,4")
    try:
        said, _ = process.communicate(timeout=250)
    finally:
        process.kill()
    assert process.returncode == 0, said
    assert said.count("pretrain  fold 0  done") == 2, said  # each job once, told by one process
    pair, alone = (compose(outputs, *twenty, "seed=4", *more) for more in (TWO, ("pretrain.batch=2",)))
    train(alone)
    folders = [open_experiment(cfg).run("pretrain", 0).folder for cfg in (pair, alone)]
    assert folders[0] != folders[1]
    difference, worst = largest_difference(*map(state, folders))
    assert difference <= TOLERANCE, worst
    assert json.loads((folders[0] / "run.json").read_text())["settings"]["processes"] == 2
    curves = [read_metrics(f / "metrics.jsonl") for f in folders]
    for name in ("train/loss", "val/loss"):
        np.testing.assert_allclose(curves[0][name], curves[1][name], rtol=1e-5)
    assert not [p for p in folders[0].iterdir() if "part" in p.name]


def workers_of(process):
    found = psutil.Process(process.pid).children()
    return [c for c in found if "aneurysm.worker" in " ".join(c.cmdline())]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_dying_process_ends_the_others_and_is_named(outputs, victim):
    process = start(outputs, *SMALL, *TWO, "pretrain.epochs=1000", f"seed={10 + victim}")
    try:
        wait_for(lambda: running(outputs, 10 + victim))
        workers = sorted(workers_of(process), key=lambda w: w.environ()["RANK"])
        assert len(workers) == 2
        workers[victim].send_signal(signal.SIGKILL)
        said, _ = process.communicate(timeout=60)  # 10 s of grace for the other one
    finally:
        process.kill()
    assert process.returncode == 1
    assert f"Process {victim} of the 2" in said and "SIGKILL" in said
    assert not any(w.is_running() and w.status() != "zombie" for w in workers)


def running(outputs, seed):
    for note in outputs.glob("smoke/pretrain/*/fold_0/run.json"):
        if json.loads(note.read_text())["settings"]["seed"] == seed:
            return (note.parent / "last.ckpt").is_file()
    return False


def wait_for(condition, seconds=200):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.05)


@pytest.mark.slow
def test_workers_end_with_the_one_that_started_them(outputs):
    process = start(outputs, *SMALL, *TWO, "pretrain.epochs=1000", "seed=20")
    try:
        wait_for(lambda: running(outputs, 20))
        workers = workers_of(process)
        assert len(workers) == 2
    finally:
        process.kill()
    wait_for(lambda: not any(w.is_running() and w.status() != "zombie" for w in workers), 20)


def test_a_mistake_of_the_user_is_one_sentence(outputs):
    folder = ("data=folder", "data.root=/no-such-folder", "stage=pretrain")
    with pytest.raises(UserError, match="no-such-folder"):
        train(compose(outputs, *TWO, *folder, "~data.patients", "~data.size", "~data.seed"))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("trainer=ddp", "trainer.accelerator=cpu"), "trainer.devices=2"),
        (("trainer.devices=2",), "trainer=ddp"),
        ((*TWO, "trainer.num_nodes=2"), "srun"),
        (("trainer.devices=0",), "at least one"),
    ],
)
def test_numbers_of_processes_that_cannot_be(tmp_path, overrides, said):
    with pytest.raises(UserError, match=said):
        to_be_launched(compose(tmp_path, *overrides).trainer)


def test_the_number_of_processes_is_part_of_the_run(tmp_path):
    def keys(*overrides):
        return {
            s: stage_key(compose(tmp_path, *overrides), s, "data") for s in ("pretrain", "expert", "stacker")
        }

    alone = keys("trainer=ddp", "trainer.devices=1")
    assert alone == keys()
    assert not set(alone.values()) & set(keys(*TWO).values())


# What is computed over a batch of which every process holds a part, against one process with all of it.


def _member(rank, world, port, work, folder):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    torch.save(work(rank, world), folder / f"{rank}.pt")
    dist.destroy_process_group()


def in_processes(work, folder, world=2):
    """What `work(rank, world)` returns in each of several processes."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    mp.spawn(_member, (world, store.port, work, folder), nprocs=world)  # pyright: ignore
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def part(x, rank, world):
    return x[rank * len(x) // world : (rank + 1) * len(x) // world]


def _network():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv3d(2, 4, 3),
        nn.BatchNorm3d(4),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(32, 5),
        nn.BatchNorm1d(5, affine=False, momentum=None),
        nn.Linear(5, 1),
    ).double()
    return net, torch.randn(6, 2, 4, 4, 4).double(), torch.rand(6, 1).double()


def _learn(rank, world):
    net, x, y = _network()
    over_all_processes(net)
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-2)
    torch.manual_seed(1)
    for _ in range(3):
        optimiser.zero_grad()
        answer, truth = gather(net(part(x, rank, world)), part(y, rank, world))
        # Not a mean over rows: a ratio of sums, as overlap losses are.
        loss = 1 - (answer.sigmoid() * truth).sum() / (answer.sigmoid() + truth).sum()
        loss.backward()
        for parameter in net.parameters():
            assert parameter.grad is not None
            if world > 1:
                dist.all_reduce(parameter.grad)
                parameter.grad /= world
        optimiser.step()
    return net.state_dict(), float(loss), torch.rand(1)


def test_ratios_batch_norms_and_dropout_are_those_of_the_whole_batch(tmp_path):
    alone = _learn(0, 1)
    for state_dict, loss, drawn in in_processes(_learn, tmp_path):
        # Double precision, sums in another order: measured 1e-11 after the division by a small variance.
        assert largest_difference(state_dict, alone[0])[0] < 1e-9
        assert loss == pytest.approx(alone[1], abs=1e-9)
        assert drawn == alone[2]  # the generators are still in step


def _odd_parts(rank, world):
    own = torch.arange(3.0 * rank, 3.0 * rank + (3 if rank else 0), requires_grad=True)
    flags = own.detach() > 3.5
    rows, held = gather(own, flags)
    (rows * torch.arange(1.0, len(rows) + 1)).sum().backward()
    assert own.grad is not None
    scale = RunningScale(2, momentum=0.5)
    scale(torch.full((2, 2), 4.0 * rank), torch.tensor([True, rank == 0]))
    try:
        from_first(lambda: (_ for _ in ()).throw(UserError("only the first process looked")))
    except UserError as error:
        told = str(error)
    items = list(range(7))
    return {
        "rows": rows.tolist(),
        "held": held.tolist(),
        "grad": own.grad.tolist(),
        "total": float(total(torch.tensor(rank + 1.0))),
        "mean": scale.mean.tolist(),
        "told": told,
        "value": from_first(lambda: rank + 5),
        "squares": gathered([i * i for i in shared(items)]),
        "squares of one": gathered_by_first([i * i for i in shared(items)]),
        "anywhere": (anywhere(rank == 1), anywhere(False)),
        "drawn": rand_rows(2, 1).tolist(),
    }


def test_parts_of_unequal_length_and_the_verbs_of_sharing(tmp_path):
    first, second = in_processes(_odd_parts, tmp_path)
    assert first["rows"] == second["rows"] == [3.0, 4.0, 5.0]
    assert first["held"] == second["held"] == [False, True, True]
    assert first["grad"] == [] and second["grad"] == [2.0, 4.0, 6.0]  # twice: averaging halves it again
    assert first["mean"] == second["mean"] == pytest.approx([4 / 3, 4 / 3])  # rows 0, 0 and 4
    squares = [i * i for i in range(7)]
    assert first["squares"] == second["squares"] == squares
    assert first["squares of one"] == squares and second["squares of one"] == []
    for said in (first, second):
        assert said["told"] == "only the first process looked"
        assert said["total"] == 3.0 and said["value"] == 5 and said["anywhere"] == (True, False)


# Whole stages. In float64, because that shows that both compute the same thing: in float32 the U-Net's
# weights differ by 1e-2 after 20 steps when one process alone takes the same batches in another order, as
# rounding errors of 1e-7 grow with every step at its learning rate. The measured differences are 1e-14.
STAGES = {
    "spark": ("pretrain", "pretrain.steps=10;pretrain.epochs=2", "pretrain.batch", 1),
    "anatomask": ("pretrain", "masking=anatomask;pretrain.steps=10;pretrain.epochs=2", "pretrain.batch", 1),
    "vessel": ("vessel", "vessel.steps=10;vessel.epochs=2", "vessel.batch", 2),
    "segmenter": ("segmenter", "smart_net.steps=10;smart_net.epochs=2", "smart_net.batch", 2),
    # Four graphs: one process gets three of them, the other one.
    "graph": ("smart_net", "graph_net.dropout=0;smart_net.graph_epochs=20", "graphs", 3),
    "expert": (
        "expert",
        "expert.steps=10;expert.epochs=2;expert.freeze_epochs=1;+balance.calibrate=true;+balance.calibration_steps=5",
        "expert.batch",
        4,
    ),
    "expert_uw": ("expert", "expert.steps=10;expert.epochs=2;balance=uw", "expert.batch", 4),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A whole experiment that two processes have trained, without what cannot be equal."""
    folder = tmp_path_factory.mktemp("trained")
    train(compose(folder, *TWO, *STABLE))
    return folder


# A vessel net that does not blow rounding up (see above), and no dropout on the edges of graphs, whose
# numbers differ from process to process.
STABLE = ("segmenter@vessel.net=segformer3d", "graph_net.dropout=0.0")


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_every_stage_of_two_processes_equals_one_with_twice_the_batch(trained, tmp_path):
    def stages(processes):
        return [
            f"{name}:{stage}:{fixed};{key}={batch * 2 // processes};"
            + ("" if name == "vessel" else ";".join(STABLE))
            for name, (stage, fixed, key, batch) in STAGES.items()
        ]

    script = str(ROOT / "tests/runs/train_stages.py")
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    for name, before, processes in (("one", [], 1), ("two", launcher, 2)):
        subprocess.run(
            [
                sys.executable,
                *before,
                script,
                "float64",
                str(trained),
                str(tmp_path / name),
                *stages(processes),
            ],
            check=True,
            env={**environment(), "GLOO_SOCKET_IFNAME": "lo"},
        )
    for name in STAGES:
        difference, worst = largest_difference(state(tmp_path / "one" / name), state(tmp_path / "two" / name))
        print(f"{name}: {difference:.1e} ({worst})")
        assert difference <= TOLERANCE, (name, worst)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_tables_of_two_processes_equal_those_of_one_with_twice_the_batch(trained):
    doubled = ("pretrain.batch=2", "vessel.batch=4", "smart_net.batch=4", "expert.batch=8")
    alone, pair = compose(trained, *STABLE, *doubled), compose(trained, *STABLE, *TWO)
    train(alone)
    for stage, name in (
        ("vessel", "overlap.csv"),
        ("smart_net", "candidates.parquet"),
        ("expert", "predictions.parquet"),
        ("stacker", "scans.parquet"),
    ):
        read = pd.read_csv if name.endswith("csv") else pd.read_parquet
        for fold in (0, 1):
            one, two = (
                read(open_experiment(cfg).run(stage, fold).read_product(name)) for cfg in (alone, pair)
            )
            if name == "overlap.csv":  # counts of pieces and rings jump where one voxel changes
                one, two = (t[["series_uid", "recall", "precision", "dice"]] for t in (one, two))
            # Float32 weights that differ by 1e-5, as above; probabilities travel in steps of 1/255.
            pd.testing.assert_frame_equal(one, two, rtol=5e-3, atol=5e-3, check_dtype=True)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sharded_training_equals_one_process_too(outputs):
    twenty = (*SMALL, "pretrain.steps=10", "pretrain.epochs=2", "seed=5", "masking=anatomask")
    pair = compose(outputs, *twenty, *TWO[1:], "trainer=fsdp")
    alone = compose(outputs, *twenty, "pretrain.batch=2")
    train(pair)
    train(alone)
    one, two = (state(open_experiment(cfg).run("pretrain", 0).folder) for cfg in (alone, pair))
    # The hooks that hold biases without effect still do not survive sharding; they are left out.
    seen = [k for k in one if not k.endswith("qkv.bias")]
    difference, worst = largest_difference({k: one[k] for k in seen}, {k: two[k] for k in seen})
    assert difference <= TOLERANCE, worst
