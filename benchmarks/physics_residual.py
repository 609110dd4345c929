"""Time and exactness of the forward-Laplacian residual against nested autograd, on one thread.

python benchmarks/physics_residual.py
"""

import time

import torch

from aneurysm.physics.jet_mlp import JetMLP
from aneurysm.physics.navier_stokes import compute_navier_stokes_residuals, navier_stokes_residual


def main() -> None:
    """Print the ratio for some sizes; both forms compute loss and gradients of the same network."""
    torch.set_num_threads(1)
    for width, depth, points in ((32, 3, 2048), (64, 4, 2048)):
        torch.manual_seed(0)
        net = JetMLP(latent_dim=4, width=width, depth=depth)
        latent = torch.randn(1, 4, dtype=torch.float64)
        x = torch.rand(1, points, 3, dtype=torch.float64)

        def jets(net=net, latent=latent, x=x) -> torch.Tensor:
            jet = net(x, latent)
            mass, force = navier_stokes_residual(
                jet[..., :3], jet[..., 3], torch.ones(1, dtype=torch.float64)
            )
            return (mass**2).mean() + (force**2).sum(-1).mean()

        def nested(net=net, latent=latent, x=x) -> torch.Tensor:
            flat = x[0].clone().requires_grad_(True)
            parts = compute_navier_stokes_residuals(net.values(flat[None], latent)[0], flat, rho=1.0, mu=1.0)
            return sum((part**2).mean() for part in parts)  # type: ignore[return-value]

        seconds = {}
        for name, residual in (("jets", jets), ("nested autograd", nested)):
            best = float("inf")
            for _ in range(5):
                net.zero_grad()
                started = time.process_time()
                residual().backward()
                best = min(best, time.process_time() - started)
            seconds[name] = best
        ratio = seconds["nested autograd"] / seconds["jets"]
        print(
            f"width {width} depth {depth} points {points}: jets {seconds['jets']:.3f} s, ratio {ratio:.1f}x"
        )


if __name__ == "__main__":
    main()
