"""What of the configuration changes a stage's result, and the hash that names it.

The hash covers the settings the stage reads, the data, the folds and the hashes of the stages before it.
"""

import hashlib
import json
import platform
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

import aneurysm
from aneurysm.data.errors import UserError

# What each part of the pipeline reads from the configuration, and which parts come before it.
READS: dict[str, tuple[str, ...]] = {
    "pretrain": ("backbone", "masking", "pretrain"),
    "vessel": ("loss", "vessel"),
    "segmenter": ("loss", "smart_net"),
    "smart_net": ("graph_net", "smart_net"),
    "expert": ("backbone", "oscillator", "fusion", "metadata", "physics", "balance", "loss", "expert"),
    "stacker": ("stacker",),
}
UPSTREAM: dict[str, tuple[str, ...]] = {
    "pretrain": (),
    "vessel": (),
    "segmenter": ("vessel",),
    "smart_net": ("segmenter",),
    "expert": ("pretrain", "smart_net"),
    "stacker": ("expert",),
}
# Raised when networks of the stage can no longer read the weights that it wrote before.
WEIGHTS_FORMAT = {"pretrain": 2, "expert": 2}
# The part of the Smart Net that only its segmentation network reads, and the part that only its graph reads.
_GRAPH_KEYS = (
    "anomaly",
    "candidates",
    "graph_members",
    "unsupervised",
    "threshold",
    "graph_epochs",
    "graph_lr",
    "max_candidates",
    "min_distance_mm",
    "node_spacing_mm",
    "repair",
)
_OWN_EMA = {"vessel": "vessel", "segmenter": "smart_net", "smart_net": "smart_net"}  # stage -> its settings
STRATEGIES = ("one", "ddp", "fsdp")  # how several processes train together
_ALWAYS = ("prepare", "folds", "fold_seed", "seed")
_NO_EFFECT = frozenset({"root", "meshes", "jobs", "workers", "overlap", "recompute"})


def stage_key(cfg: DictConfig, stage: str, data_fingerprint: str) -> str:
    """Eight hexadecimal digits that name a configuration of a stage and of everything before it."""
    return _digest(
        {
            "settings": settings_of(cfg, stage),
            "data": data_fingerprint,
            "upstream": {s: stage_key(cfg, s, data_fingerprint) for s in upstream(cfg, stage)},
        }
    )


def run_record(cfg: DictConfig, stage: str, data_fingerprint: str) -> dict[str, Any]:
    """What a run notes about itself: settings, upstream runs, versions."""
    return {
        "stage": stage,
        "settings": settings_of(cfg, stage),
        "data": data_fingerprint,
        "upstream": {s: stage_key(cfg, s, data_fingerprint) for s in upstream(cfg, stage)},
        "versions": {
            "aneurysm": aneurysm.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def pretrains(cfg: DictConfig) -> bool:
    """Whether the backbone is pretrained (`masking=none` says no)."""
    return not cfg.masking._target_.endswith(".absent")


def upstream(cfg: DictConfig, stage: str) -> tuple[str, ...]:
    """The stages whose products `stage` reads under this configuration."""
    return tuple(s for s in UPSTREAM[stage] if s != "pretrain" or pretrains(cfg))


def settings_of(cfg: DictConfig, stage: str) -> dict[str, Any]:
    """The settings that change this stage's result, resolved to plain containers."""
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    chosen = {name: plain[name] for name in (*READS[stage], *_ALWAYS)}
    if stage == "segmenter":
        chosen["smart_net"] = {k: v for k, v in chosen["smart_net"].items() if k not in _GRAPH_KEYS}
    if stage == "smart_net":
        chosen["smart_net"] = {k: chosen["smart_net"][k] for k in _GRAPH_KEYS}
    if stage in WEIGHTS_FORMAT:
        chosen["weights_format"] = WEIGHTS_FORMAT[stage]
    chosen["precision"] = plain["trainer"]["precision"]
    for node in _OWN_EMA.values():
        if node in chosen:
            chosen[node] = {k: v for k, v in chosen[node].items() if k != "ema"}
    if (decay := ema(cfg, stage)) is not None and stage != "stacker":  # trees have no weights to average
        chosen["ema"] = decay
    # `batch` is that of one process: more of them make a larger batch, and another result.
    if stage != "stacker" and (count := processes(cfg.trainer)) > 1:
        chosen["processes"] = count
    return _without(chosen)


def ema(cfg: DictConfig, stage: str) -> float | None:
    """Decay per step of the average of a stage's weights, None for no average."""
    decay = cfg[_OWN_EMA[stage]].ema if stage in _OWN_EMA else cfg.ema
    return None if decay is None else float(decay)


def processes(trainer: DictConfig) -> int:
    """How many processes train together under these settings.

    Raises:
        UserError: it cannot be told, or the settings contradict each other.
    """
    per_machine, machines = trainer.devices, int(trainer.num_nodes)
    if per_machine == "auto":
        if trainer.accelerator == "cpu" or not torch.cuda.is_available():
            raise UserError(
                "trainer.devices=auto means one process per GPU, and there is none here. "
                "Say how many processes to train with, for example trainer.devices=2."
            )
        per_machine = torch.cuda.device_count()
    count = int(per_machine) * machines
    if count < 1:
        raise UserError(f"trainer.devices={trainer.devices}: at least one process has to train.")
    if trainer.strategy not in STRATEGIES:
        raise UserError(f"trainer.strategy={trainer.strategy}: it is one of {', '.join(STRATEGIES)}.")
    if count > 1 and trainer.strategy == "one":
        raise UserError(
            f"{count} processes need a way to train together: add trainer=ddp (or trainer=fsdp), or set "
            "trainer.devices=1 and trainer.num_nodes=1."
        )
    return count


def _without(node: Any) -> Any:
    if isinstance(node, dict):
        return {k: _without(v) for k, v in node.items() if k not in _NO_EFFECT}
    return [_without(v) for v in node] if isinstance(node, list) else node


def variant_name(cfg: DictConfig, stage: str) -> str:
    """A word or two that tell a person which variant this is."""

    def word(node: DictConfig) -> str:
        return node._target_.rsplit(".", 1)[-1].replace("absent", "none").lower()

    names = {
        "pretrain": lambda: word(cfg.masking),
        "vessel": lambda: f"{word(cfg.vessel.net)}-{word(cfg.loss)}",
        "segmenter": lambda: f"{word(cfg.smart_net.net)}-{word(cfg.loss)}",
        "smart_net": lambda: word(cfg.graph_net),
        "expert": lambda: "-".join(
            [word(cfg.oscillator) + str(cfg.oscillator_dim), word(cfg.physics), word(cfg.balance)]
        ),
        "stacker": lambda: "xgboost",
    }
    return names[stage]()


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
