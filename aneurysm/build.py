"""From configuration to objects: the only place where Hydra instantiates anything."""

from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn

from aneurysm.data.errors import UserError
from aneurysm.nets.refinement import Refinement
from aneurysm.stages.roi import RoiSettings
from aneurysm.stages.smart_net import CHANNELS, INPUTS, GraphSettings
from aneurysm.stages.stacker import Boosting
from aneurysm.stages.vessel import CLASSES, names_arteries
from aneurysm.stages.vessel import INPUTS as VESSEL_INPUTS
from aneurysm.stages.volumes import View
from aneurysm.vessels.repair import VesselRules


def absent() -> None:
    """The `none` option of a config group: nothing is built."""
    return None


def build(node: DictConfig, **runtime: Any) -> Any:
    """Make the object that a config group describes.

    Args:
        node: a node with `_target_`.
        runtime: arguments that exist only now, such as channel counts. They go straight to the call, so
            they never pass through OmegaConf.

    Raises:
        UserError: the option does not take a setting that it is given, or a value of it.
    """
    try:
        if not runtime:
            return instantiate(node, _convert_="all")
        return instantiate(node, _convert_="all", _partial_=True)(**runtime)
    except ValueError as error:  # what the constructor says of its arguments
        raise UserError(f"{node.get('_target_', 'configuration')}: {error}") from error
    except InstantiationException as error:  # Hydra's wrapping of it
        cause = error.__cause__
        if isinstance(cause, UserError):
            raise cause from None
        if isinstance(cause, ValueError):
            raise UserError(f"{node.get('_target_', 'configuration')}: {cause}") from error
        if isinstance(cause, TypeError) and "unexpected keyword" in str(cause):
            raise UserError(
                f"{cause}: an experiment file or an override sets it for another option of the group than "
                "the one chosen. Leave that file out, or take the setting away with '~group.key'."
            ) from error
        raise


def build_expert(cfg: DictConfig, graph_features: int) -> nn.Module:
    """The expert network from its config groups.

    Args:
        graph_features: how many numbers the graph gives per candidate.
    """
    return build(
        cfg.expert.net,
        backbone=build(cfg.backbone, oscillators=build(cfg.oscillator)),
        fusion=build(cfg.fusion),
        metadata=build(cfg.metadata),
        physics=build(cfg.physics),
        graph_features=graph_features,
    )


def try_networks(cfg: DictConfig) -> None:
    """Build the networks that `cfg.stage` trains, or reads from earlier stages, and throw them away.

    A wrong setting of the expert is so told at once, not after hours of the stages before it.

    Raises:
        UserError: a network cannot be built with these settings.
    """
    last = cfg.stage
    if last != "pretrain":
        roi_settings(cfg.vessel)
        build_vessel(cfg)
    if last not in ("pretrain", "vessel"):
        build_segmenter(cfg)
    if last in ("expert", "stacker", "all"):
        build_expert(cfg, graph_features=1)
    elif last == "pretrain":
        build(cfg.backbone)


def build_vessel(cfg: DictConfig) -> nn.Module:
    """The vessel net, with a channel for each artery where `vessel.classes` asks for them."""
    classes = cfg.vessel.get("classes", "binary")  # bundles of before named no arteries
    names_arteries(classes)
    return build(cfg.vessel.net, in_channels=VESSEL_INPUTS, out_channels=CLASSES[classes])


def build_segmenter(cfg: DictConfig) -> nn.Module:
    """The Smart Net's segmentation network; with `refine` it starts from what the vessel stage found."""
    s = cfg.smart_net
    net = build(s.net, in_channels=len(INPUTS), out_channels=len(CHANNELS))
    return Refinement(net) if s.refine else net


def boosting(cfg: DictConfig) -> Boosting:
    """Settings of the stacker's trees."""
    return Boosting(**{k: cfg.stacker[k] for k in cfg.stacker}, seed=int(cfg.seed))


def graph_settings(s: DictConfig) -> GraphSettings:
    """Settings of the vessel graph and its candidates."""
    # Bundles of before only dropped crumbs and filled holes.
    rules = build(s.repair) if "repair" in s else VesselRules(gap_mm=0.0, sac_mm=0.0)
    return GraphSettings(float(s.node_spacing_mm), int(s.max_candidates), float(s.min_distance_mm), rules)


def roi_settings(s: DictConfig) -> RoiSettings | None:
    """How the vessel stage finds the region of interest; None where it looks at whole scans.

    Raises:
        UserError: a setting is out of range.
    """
    roi = s.get("roi")  # bundles of before have none
    if roi is None or not roi.enabled:
        return None
    try:
        return RoiSettings(
            spacing_mm=float(roi.spacing_mm),
            size_mm=tuple(roi.size_mm),
            min_probability=float(roi.min_probability),
            min_share=float(roi.min_share),
            fallback=str(roi.fallback),
            exact=bool(roi.exact),
        )
    except ValueError as error:
        raise UserError(f"vessel.roi: {error}") from error


def view_settings(s: DictConfig) -> View:
    """How a segmentation stage looks at whole volumes."""
    return View(int(s.window), float(s.overlap), tuple(s.flips))
