"""From configuration to objects: the only place where Hydra instantiates anything."""

from typing import TYPE_CHECKING, Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from aneurysm.data.errors import UserError
from aneurysm.losses.heatmap import HeatmapLoss, WithHeatmap
from aneurysm.nets.graph_ensemble import GraphEnsemble
from aneurysm.nets.refinement import Refinement
from aneurysm.stages import heatmap
from aneurysm.stages.roi import RoiSettings
from aneurysm.stages.smart_net import INPUTS, GraphSettings, channels
from aneurysm.stages.stacker import Boosting
from aneurysm.stages.vessel import CLASSES, names_arteries
from aneurysm.stages.vessel import INPUTS as VESSEL_INPUTS
from aneurysm.stages.volumes import View
from aneurysm.vessels.candidates import SOURCES
from aneurysm.vessels.features import EDGE_FEATURES, NODE_FEATURES

if TYPE_CHECKING:  # it brings torch_geometric, which takes 0.6 s, and every command imports this module
    from aneurysm.nets.masked_regression import MaskedNodeRegression


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
        build_segmenter_loss(cfg)
    if last not in ("pretrain", "vessel", "segmenter"):
        graph_settings(cfg.smart_net)
        build_graph_net(cfg, len(NODE_FEATURES), len(EDGE_FEATURES))
    if last in ("expert", "stacker", "all"):
        build_expert(cfg, graph_features=1)
    elif last == "pretrain":
        build(cfg.backbone)


def build_vessel(cfg: DictConfig) -> nn.Module:
    """The vessel net, with a channel for each artery where `vessel.classes` asks for them."""
    classes = cfg.vessel.classes
    names_arteries(classes)
    return build(cfg.vessel.net, in_channels=VESSEL_INPUTS, out_channels=CLASSES[classes])


def segmenter_channels(cfg: DictConfig) -> tuple[str, ...]:
    """What the Smart Net's segmenter answers.

    Raises:
        UserError: no such heat map.
    """
    kind = cfg.smart_net.heatmap
    if kind not in heatmap.KINDS:
        raise UserError(f"smart_net.heatmap={kind}: it is one of {', '.join(heatmap.KINDS)}.")
    return channels(kind)


def build_segmenter(cfg: DictConfig) -> nn.Module:
    """The Smart Net's segmentation network; with `refine` it starts from what the vessel stage found."""
    s = cfg.smart_net
    net = build(s.net, in_channels=len(INPUTS), out_channels=len(segmenter_channels(cfg)))
    return Refinement(net) if s.refine else net


def build_segmenter_loss(cfg: DictConfig) -> nn.Module:
    """The loss of its masks, and with a heat-map head the loss of that too."""
    s, masks = cfg.smart_net, build(cfg.loss)
    if heatmap.HEATMAP not in segmenter_channels(cfg):
        return masks
    if float(s.heatmap_sigma_mm) <= 0:
        raise UserError(f"smart_net.heatmap_sigma_mm={s.heatmap_sigma_mm}: a Gaussian has a width above 0.")
    try:
        return WithHeatmap(masks, HeatmapLoss(str(s.heatmap_loss)), float(s.heatmap_weight))
    except ValueError as error:
        raise UserError(f"smart_net.heatmap_loss, heatmap_weight: {error}") from error


def has_graph_net(cfg: DictConfig) -> bool:
    """Whether a net scores the nodes (`graph_net=none` and candidates from the heat map alone need none)."""
    return not cfg.graph_net._target_.endswith(".absent") and cfg.smart_net.candidates.source != "heatmap"


def build_graph_net(cfg: DictConfig, in_features: int, edge_features: int) -> nn.Module | None:
    """The net that scores the nodes of the vessel graph; None where geometry does.

    Args:
        in_features: columns of the node features, NODE_FEATURES first.
        edge_features: columns of the edge features.
    """
    if not has_graph_net(cfg):
        return None
    s = cfg.smart_net
    masked = cfg.graph_net._target_.endswith(".MaskedNodeRegression")
    if masked:
        return _masked_regression(cfg.graph_net, in_features, edge_features)
    anomaly, width = None, in_features
    if s.unsupervised:
        anomaly, width = _masked_regression(s.anomaly, in_features, edge_features), in_features + 1
    members = int(s.graph_members)
    if members < 1:
        raise UserError(f"smart_net.graph_members={members}: at least one net has to score the nodes.")
    nets = [build(cfg.graph_net, in_features=width, edge_features=edge_features) for _ in range(members)]
    net = nets[0] if members == 1 else GraphEnsemble(nets)
    if anomaly is None:
        return net
    from aneurysm.nets.masked_regression import WithAnomaly

    return WithAnomaly(anomaly, net)


def _masked_regression(node: DictConfig, in_features: int, edge_features: int) -> "MaskedNodeRegression":
    unknown = sorted(set(node.targets) - set(NODE_FEATURES))
    if unknown:
        raise UserError(
            f"targets={list(node.targets)}: {', '.join(unknown)} are no node features. "
            f"There are {', '.join(NODE_FEATURES)}."
        )
    columns = [NODE_FEATURES.index(name) for name in node.targets]
    bare = OmegaConf.create({k: node[k] for k in node if k != "targets"})
    return build(bare, in_features=in_features, edge_features=edge_features, targets=columns)


def boosting(cfg: DictConfig) -> Boosting:
    """Settings of the stacker's trees."""
    return Boosting(**{k: cfg.stacker[k] for k in cfg.stacker}, seed=int(cfg.seed))


def graph_settings(s: DictConfig) -> GraphSettings:
    """Settings of the vessel graph and its candidates.

    Raises:
        UserError: no such source of candidates, or a score out of range.
    """
    source, least = str(s.candidates.source), float(s.candidates.min_score)
    if source not in SOURCES:
        raise UserError(f"smart_net.candidates.source={source}: it is one of {', '.join(SOURCES)}.")
    if not 0 <= least < 1:
        raise UserError(f"smart_net.candidates.min_score={least}: a score lies in 0..1, below 1 here.")
    return GraphSettings(
        float(s.node_spacing_mm),
        int(s.max_candidates),
        float(s.min_distance_mm),
        source,
        least,
        build(s.repair),
    )


def roi_settings(s: DictConfig) -> RoiSettings | None:
    """How the vessel stage finds the region of interest; None where it looks at whole scans.

    Raises:
        UserError: a setting is out of range.
    """
    roi = s.roi
    if not roi.enabled:
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
