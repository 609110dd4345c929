"""A training step of the configured expert on vessels given by formulas, for `physics.py`."""

from collections.abc import Callable, Sequence

import hydra
import numpy as np
import torch
from omegaconf import DictConfig

from aneurysm.build import build, build_expert
from aneurysm.command_line import config_folder
from aneurysm.nets.expert import ExpertBatch, Movable
from aneurysm.physics.flow_points import FlowPoints, collate_flow
from aneurysm.physics.flow_sampling import sample_flow_points
from aneurysm.physics.reference_vessels import tube, tube_with_sac
from aneurysm.stages.expert import ExpertModule
from aneurysm.stages.findings import Target

GRAPH_FEATURES, LOCATIONS = 8, 13
SPACING_MM = 0.75
Batch = tuple[ExpertBatch, Target]


def configured(overrides: Sequence[str]) -> DictConfig:
    """Settings of train.py."""
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        return hydra.compose("train", overrides=list(overrides))


def made(cfg: DictConfig) -> ExpertModule:
    """The expert of a configuration, as training begins with it."""
    torch.manual_seed(0)
    s = cfg.expert
    net = build_expert(cfg, GRAPH_FEATURES)
    net.backbone.patch_embed.requires_grad_(False)  # pyright: ignore[reportCallIssue,reportAttributeAccessIssue]
    return ExpertModule(
        net,  # pyright: ignore[reportArgumentType]
        build(cfg.balance),
        build(cfg.loss),
        s.lr,
        s.weight_decay,
        total_steps=100_000,
        steps_per_epoch=1000,
        physics_optimiser=s.physics_optimiser,
        physics_lr=s.physics_lr,
    ).train()


def training_step(module: ExpertModule, batch: Batch) -> Callable[[], None]:
    """One step of a plain loop: forward, losses, backward, optimiser; without Lightning and its logs."""
    setup, weights = module.configure_optimizers(), list(module.parameters())
    optimiser, schedule = setup["optimizer"], setup["lr_scheduler"]["scheduler"]
    inputs, target = batch

    def step() -> None:
        output = module.net(inputs, progress=0.5)
        module.balance(module.terms(output, target))[0].backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()

    return step


def head_alone(module: ExpertModule, flow: Movable | None) -> Callable[[], None]:
    """Forward and backward of the physics head, from the codes."""
    head = module.net.physics
    assert head is not None and isinstance(flow, FlowPoints)
    code = torch.randn(len(flow.valid), int(head.latent_dim), device=flow.valid.device).requires_grad_()  # pyright: ignore[reportArgumentType]

    def step() -> None:
        head.zero_grad()
        head(code, flow, 0.5).total.backward()

    return step


def soap_alone(module: ExpertModule) -> Callable[[], None]:
    """Ten steps of the flow network's optimiser on random gradients, in which it turns its basis once."""
    soap = module.configure_optimizers()["optimizer"].parts[1]
    assert module.net.physics is not None
    weights = list(module.net.physics.parameters())

    def ten() -> None:
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        for _ in range(10):
            soap.step()

    return ten


def candidates(count: int, crop: int, device: str) -> Batch:
    """Tubes of several widths, every other one with a sac, in voxels; all with flow."""
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    index = np.indices((crop,) * 3).reshape(3, -1).T
    places = (index - (crop - 1) / 2) * SPACING_MM
    vessels, sacs, flows = [], [], []
    for i, radius in enumerate(np.linspace(1.5, 2.5, count)):
        walls = (tube(), tube_with_sac(sac_radius=1.3) if i % 2 else tube())
        # How much of a voxel is lumen: the distance from the wall is about R phi / 2.
        plain, full = (
            np.clip(0.5 + wall.interpolate(places / radius) * radius / 2 / SPACING_MM, 0, 1).reshape(
                (crop,) * 3
            )
            for wall in walls
        )
        along = np.arange(-0.45, 0.46, 0.05)[:, None] * np.array([crop * SPACING_MM, 0, 0])
        tangent, radii = np.tile([1.0, 0, 0], (len(along), 1)), np.full(len(along), radius)
        flows.append(sample_flow_points(full, np.full(3, SPACING_MM), along, tangent, radii, rng=rng))
        vessels.append(torch.from_numpy(full).float())
        sacs.append(torch.from_numpy(full - plain > 0.5).float())
    vessel, mask, flow = torch.stack(vessels)[:, None], torch.stack(sacs)[:, None], collate_flow(flows)
    if not bool(flow.valid.all()):
        raise RuntimeError(f"Flow in {int(flow.valid.sum())} of {count} vessels: the crop is too small.")
    sac = mask.amax((1, 2, 3, 4)) > 0
    inputs = ExpertBatch(
        image=vessel + 0.3 * torch.randn(count, 4, crop, crop, crop),
        present=torch.eye(4, dtype=torch.bool)[torch.arange(count) % 4],
        vessel=vessel,
        age=torch.full((count,), 60.0),
        sex=torch.zeros(count),
        position=torch.zeros(count, 3),
        graph=torch.randn(count, GRAPH_FEATURES),
        score=torch.full((count,), 0.5),
        flow=flow,
    )
    target = Target(
        is_aneurysm=sac.float(),
        location=torch.where(sac, torch.arange(count) % LOCATIONS, -1),
        offset_mm=torch.where(sac[:, None], torch.zeros(count, 3), torch.nan),
        mask=mask,
        mask_known=torch.ones(count, 1, dtype=torch.bool),
    )
    return inputs.to(device), Target(**{name: value.to(device) for name, value in vars(target).items()})
