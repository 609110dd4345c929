"""Train: all five stages and the report, or one stage, on any data set that a reader knows."""

import logging
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from aneurysm.build import try_networks
from aneurysm.bundle import write_bundle
from aneurysm.data.labels import MODALITIES
from aneurysm.data.tables import CANDIDATES, SCANS
from aneurysm.evaluation.lesion_kinds import lesion_facts
from aneurysm.evaluation.summary import Evaluation, evaluate_scans
from aneurysm.experiment import Experiment, open_experiment
from aneurysm.report.curves import TrainingCurve
from aneurysm.report.examples import choose_examples
from aneurysm.report.html import Picture
from aneurysm.report.projections import mip_panel
from aneurysm.report.training import write_training_report
from aneurysm.runs.folders import StageRun
from aneurysm.runs.launch import joined_group, launch, to_be_launched
from aneurysm.runs.metrics import CLOCKS, FILE, read_metrics
from aneurysm.runs.record import mention_offline_runs
from aneurysm.runs.settings import READS, pretrains
from aneurysm.stages.processes import from_first, rank
from aneurysm.stages.stored import opened, remembered
from aneurysm.training.masks import read_overlap
from aneurysm.training.order import run_stage
from aneurysm.training.products import expert_table, lumen_rule, segmentation_of

log = logging.getLogger(__name__)

STAGES = ("pretrain", "vessel", "smart_net", "expert", "stacker")
# Figure by which a sweep over one stage compares its jobs.
SCORE = {
    "pretrain": "val/loss",
    "vessel": "dice",
    "segmenter": "dice",
    "smart_net": "candidate_recall",
    "expert": "candidate_auc",
    "stacker": "present_auc",
}


def train(cfg: DictConfig) -> float:
    """Run what `cfg.stage` names and return its headline figure (the RSNA score for `all`).

    With `trainer=ddp` or `fsdp` this process starts the ones that train, and waits for them.

    Raises:
        UserError: something outside the program is wrong; the message says what to do.
    """
    if to_be_launched(cfg.trainer):
        return launch(cfg)
    with joined_group(cfg.trainer):
        return _train(cfg)


def _train(cfg: DictConfig) -> float:
    started = time.monotonic()
    try_networks(cfg)
    experiment = open_experiment(cfg)
    if cfg.stage != "all":
        figures = run_stage(experiment, cfg.stage)
        mention_offline_runs()
        if rank() == 0:
            _print_stage(cfg.stage, experiment, figures)
        scores = [f[SCORE[cfg.stage]] for f in figures if SCORE[cfg.stage] in f]
        return float(np.mean(scores)) if scores else float("nan")
    _train_all(experiment)
    mention_offline_runs()
    return from_first(lambda: _finish(experiment, started))


def _finish(experiment: Experiment, started: float) -> float:
    """Evaluation, report and bundle; returns the RSNA score."""
    evaluation = evaluate(experiment)
    report = report_on(experiment, evaluation)
    bundle = write_bundle(experiment, experiment.folder / "bundle")
    _print_all(evaluation, {"report": report, "bundle": bundle, "runs": experiment.folder})
    log.info("Finished in %.0f s", time.monotonic() - started)
    return evaluation.rsna.score


def run_all(experiment: Experiment) -> Evaluation:
    """Train all stages and measure them."""
    _train_all(experiment)
    return evaluate(experiment)


def _train_all(experiment: Experiment) -> None:
    for stage in STAGES:
        if stage != "pretrain" or pretrains(experiment.cfg):
            run_stage(experiment, stage)


def evaluate(experiment: Experiment) -> Evaluation:
    """Measure the out-of-fold predictions of every patient."""
    scans = pd.concat(
        [SCANS.read(experiment.run("stacker", k).read_product("scans.parquet")) for k in experiment.folds]
    )
    candidates = pd.concat(
        [
            CANDIDATES.read(experiment.run("smart_net", k).read_product("candidates.parquet"))
            for k in experiment.folds
        ]
    )
    vessel, graph_mask = (
        pd.concat([read_overlap(experiment.run(stage, k)) for k in experiment.folds])
        for stage in ("vessel", "segmenter")
    )
    lesions = {uid: list(opened(path).lesions) for uid, path in experiment.prepared.items()}
    facts = {uid: lesion_facts(remembered(experiment.prepared[uid])) for uid, own in lesions.items() if own}
    return evaluate_scans(
        experiment.index,
        scans,
        expert=expert_table(experiment),
        lesions={uid: found for uid, found in lesions.items() if found},
        candidates=candidates,
        vessel=vessel,
        graph_mask=graph_mask,
        seed=int(experiment.cfg.seed),
        facts=facts,
    )


def report_on(experiment: Experiment, evaluation: Evaluation) -> Path:
    """Write the page that tells how good the experiment is, with pictures of scans worth looking at."""
    timings: dict[str, float] = {}
    curves: list[TrainingCurve] = []
    for stage in (*READS,):
        for fold in experiment.folds:
            run = experiment.run(stage, fold)
            done = run.finished()
            if done is None:
                continue
            timings[stage] = timings.get(stage, 0.0) + float(done.get("seconds", 0.0))
            curves += training_curves(run)
    source = experiment.cfg.data._target_.rsplit(".", 1)[-1]
    modalities = ", ".join(f"{n} {m}" for m, n in experiment.index.modality.value_counts().items())
    return write_training_report(
        experiment.folder / "report",
        evaluation,
        curves,
        figures=_example_pictures(experiment, evaluation),
        config_text=OmegaConf.to_yaml(experiment.cfg, resolve=True),
        data_text=(
            f"{source}: {len(experiment.index)} series of {experiment.index.patient_id.nunique()} patients "
            f"({modalities}). Every figure is out-of-fold over {experiment.cfg.folds} patient-grouped folds: "
            "no model of any stage had seen the patient it is measured on."
        ),
        timings=timings,
        title=f"Experiment {experiment.cfg.experiment_name}",
    )


def _example_pictures(experiment: Experiment, evaluation: Evaluation) -> list[Picture]:
    table = expert_table(experiment)
    pictures = []
    for example in choose_examples(evaluation):
        uid = example.series_uid
        case = remembered(experiment.prepared[uid])
        rows = pd.DataFrame(table[table.series_uid == uid]).sort_values("p", ascending=False).head(3)
        marks = [
            (np.array([r["x_mm"], r["y_mm"], r["z_mm"]]), float(r["p"])) for r in rows.to_dict("records")
        ]
        mask = lumen_rule(experiment, uid)(segmentation_of(experiment, uid)["vessel"], case.grid)
        panel = mip_panel(case.image, case.grid, mask, marks, case.lesions, modality=case.modality)
        pictures.append(
            Picture(f"{case.modality}, {example.kind}", panel, example.caption, group="Example scans")
        )
    return pictures


def training_curves(run: StageRun) -> list[TrainingCurve]:
    """What a run logged, one curve per network that it fitted."""
    table = read_metrics(run.folder / FILE)
    unread = [name for name in CLOCKS if name not in ("epoch", "step")]
    return [
        TrainingCurve(run.stage, run.fold, part.drop(columns=unread).dropna(axis="columns", how="all"))
        for _, part in table.groupby("fit", sort=False)
    ]


def _print_stage(stage: str, experiment: Experiment, figures: list[dict[str, Any]]) -> None:
    found = {name for f in figures for name, value in f.items() if isinstance(value, float | int)}
    names = sorted(name for name in found if not _for_the_record(name))
    table = Table("fold", *names, "folder", title=stage)
    for fold, one in zip(experiment.chosen_folds, figures, strict=True):
        table.add_row(
            str(fold), *(_number(one.get(n)) for n in names), str(experiment.run(stage, fold).folder)
        )
    Console(width=None if Console().is_terminal else 160).print(table)


def _for_the_record(name: str) -> bool:
    """Whether a figure is kept in done.json but would only make the table of a stage too wide."""
    return name.startswith(("peak_", "rule_", "recall_", "betti")) or name.rsplit("/", 1)[-1] in MODALITIES


def _print_all(evaluation: Evaluation, places: dict[str, Path]) -> None:
    table = Table("figure", "value", "95 % interval", "n", "note", title="Out-of-fold, over all patients")
    for row in evaluation.rows():
        interval = f"{row.interval.low:.3f} .. {row.interval.high:.3f}" if row.interval else ""
        table.add_row(row.figure, _number(row.value), interval, str(row.n), row.note)
    console = Console(width=None if Console().is_terminal else 150)
    console.print(table)
    for sentence in evaluation.left_out:
        console.print(f"  left out: {sentence}", markup=False)
    for name, path in places.items():
        console.print(f"{name:>8}: {path}", markup=False, soft_wrap=True)


def _number(value: Any) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.3f}"
    return "" if value is None else str(value)
