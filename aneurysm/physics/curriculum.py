"""Which part of the physics counts when: mass first, then momentum, with blood that thins over time."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PhysicsWeights:
    """Weights of the physics terms at one moment of training."""

    continuity: float
    flux: float
    momentum: float
    slip: float  # where the wall is soft
    reynolds_cap: float  # the Reynolds number in the equations is min(vessel's own, cap)


@dataclass(frozen=True)
class Curriculum:
    """Continuity and flux from the start, momentum ramped in, Reynolds number raised from viscous to real.

    Progress is the fraction of training done, 0 to 1. Momentum grows linearly from 0 at `momentum_start` to
    full weight after another `momentum_ramp`. The Reynolds cap grows geometrically from `reynolds_start` to
    `reynolds_end` over the first `reynolds_ramp`.
    """

    momentum_start: float = 0.1
    momentum_ramp: float = 0.3
    reynolds_start: float = 10.0
    reynolds_end: float = (
        130.0  # R = 2 mm with Murray's speed; beyond it the viscous term drowns in the others
    )
    reynolds_ramp: float = 0.6
    continuity_weight: float = 1.0
    flux_weight: float = 1.0
    momentum_weight: float = 1.0
    slip_weight: float = 1.0  # as boundary and flux: in full from the start

    def __post_init__(self) -> None:
        for name in ("momentum_start", "momentum_ramp", "reynolds_ramp"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a fraction of training in [0, 1], got {getattr(self, name)}.")
        if not 0 < self.reynolds_start <= self.reynolds_end:
            raise ValueError(
                "The Reynolds cap must grow from a positive start, got "
                f"reynolds_start={self.reynolds_start}, reynolds_end={self.reynolds_end}."
            )
        if min(self.continuity_weight, self.flux_weight, self.momentum_weight, self.slip_weight) < 0:
            raise ValueError(
                "Physics weights must not be negative: a negative weight rewards broken physics."
            )

    def at(self, progress: float) -> PhysicsWeights:
        """The weights at `progress`; values outside [0, 1] are clipped to the ends."""
        progress = min(max(progress, 0.0), 1.0)
        momentum = _ramp(progress - self.momentum_start, self.momentum_ramp)
        grown = _ramp(progress, self.reynolds_ramp)
        cap = self.reynolds_start * (self.reynolds_end / self.reynolds_start) ** grown
        return PhysicsWeights(
            continuity=self.continuity_weight,
            flux=self.flux_weight,
            momentum=self.momentum_weight * momentum,
            slip=self.slip_weight,
            reynolds_cap=cap,
        )


def _ramp(elapsed: float, length: float) -> float:
    if length == 0:
        return float(elapsed >= 0)
    return min(max(elapsed / length, 0.0), 1.0)
