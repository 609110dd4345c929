"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner, for networks whose loss is a stiff residual.

Notation. A parameter with two or more axes is a matrix W (m, n): its first axis by all the others. G is its
gradient, L (m, m) and R (n, n) the running means of G G^T and G^T G, Q_L and Q_R their eigenvectors in
columns. In the coordinates Q_L^T W Q_R the gradient's entries are nearly uncorrelated, so that Adam, which
scales each coordinate by itself, misses little of the curvature.

Source: Vyas et al., SOAP: Improving and Stabilizing Shampoo using Adam, ICLR 2025, arXiv 2409.11321, alg. 3.
"""

from collections.abc import Callable
from math import inf
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

ROWS, COLUMNS = 0, 1  # the sides of a matrix
Sides = dict[int, Tensor]  # a square matrix per preconditioned side; the other sides have the identity


class SOAP(Optimizer):
    """Adam in slowly turning coordinates in which the entries of a gradient matrix are uncorrelated.

        m <- b1 m + (1 - b1) G        v <- b2 v + (1 - b2) (Q_L^T G Q_R)^2
        W <- W - lr Q_L [(Q_L^T m Q_R) / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)] Q_R^T - lr weight_decay W

    then L and R take G in, so that no gradient is scaled by a basis that was fitted to it. The first moment
    stays in the parameter's own coordinates, where it remains right however the basis turns; the second, of
    squares, cannot be turned and only follows when the eigenvectors change places.

    The first gradient of a matrix only finds its basis, by eigendecomposition, and does not move it: a
    gradient is diagonal in the basis of its own making, and Adam would blow the rounding errors beside the
    diagonal up to full steps. Vectors and scalars, and matrices with no side to precondition, have no basis:
    they follow plain Adam from the first step on.

    State per parameter: `step`, the updates done; `exp_avg` and `exp_avg_sq` (m, n); `factor` and `basis`, by
    side: L and Q_L (m, m), R and Q_R (n, n). All tensors have the dtype of their parameter.

    Args:
        params: real parameters, or groups of them with options of their own.
        lr: about the length of a step along each coordinate, as in Adam.
        betas: memory of the first and the second moment.
        shampoo_beta: memory of L and R; that of the second moment when None.
        eps: floor of the root of the second moment, in units of the gradient. Along directions the loss does
            not depend on, the gradient is rounding error: an eps far below it turns it into steps.
        weight_decay: decoupled as in AdamW, per unit of lr.
        precondition_every: updates between two turns of the basis, each one step of orthogonal iteration.
        max_size: longer sides are not preconditioned; their factor would cost size^2 memory, size^3 time.

    Raises:
        ValueError: an option is outside its range.
        torch.linalg.LinAlgError: in `step`, the first gradient of a matrix is not finite.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        shampoo_beta: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        precondition_every: int = 10,
        max_size: int = 1024,
    ):
        options = dict(
            lr=lr,
            betas=betas,
            shampoo_beta=shampoo_beta,
            eps=eps,
            weight_decay=weight_decay,
            precondition_every=precondition_every,
            max_size=max_size,
        )
        super().__init__(params, options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters; what the group does not say itself is as given to the constructor."""
        _check(self.defaults | param_group)
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, _as_matrix(parameter.grad), group)
        return loss

    def _update(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        lr, (beta1, beta2), shampoo_beta = group["lr"], group["betas"], group["shampoo_beta"]
        shampoo_beta = beta2 if shampoo_beta is None else shampoo_beta
        state = self.state[parameter]
        if not state:
            state.update(_initial(grad, shampoo_beta, group["max_size"]))
            if state["basis"]:
                return
        state["step"] += 1
        mean, square, basis = state["exp_avg"], state["exp_avg_sq"], state["basis"]

        mean.lerp_(grad, 1 - beta1)
        projected = _project(grad, basis)
        square.mul_(beta2).addcmul_(projected, projected, value=1 - beta2)
        scale = (square / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        update = _project_back(_project(mean, basis) / scale, basis)
        parameter.mul_(1 - lr * group["weight_decay"])
        parameter.sub_(update.view_as(parameter), alpha=lr / (1 - beta1 ** state["step"]))

        for side, factor in state["factor"].items():
            factor.lerp_(_gram(grad, side), 1 - shampoo_beta)
            if state["step"] % group["precondition_every"] == 0:
                basis[side], order = _refreshed(factor, basis[side])
                state["exp_avg_sq"] = state["exp_avg_sq"].index_select(side, order)


def _check(options: dict[str, Any]) -> None:
    beta1, beta2 = options["betas"]
    shampoo_beta = beta2 if options["shampoo_beta"] is None else options["shampoo_beta"]
    for name, value in (("betas[0]", beta1), ("betas[1]", beta2), ("shampoo_beta", shampoo_beta)):
        if not 0 <= value < 1:
            raise ValueError(f"SOAP needs {name} in [0, 1): it is the memory of a running mean; got {value}.")
    for name in ("lr", "eps", "weight_decay"):
        if not 0 <= options[name] < inf:
            raise ValueError(f"SOAP needs {name} finite and not negative but got {options[name]}.")
    for name in ("precondition_every", "max_size"):
        if options[name] < 1:
            raise ValueError(f"SOAP needs {name} of at least 1 but got {options[name]}.")


def _initial(grad: Tensor, shampoo_beta: float, max_size: int) -> dict[str, Any]:
    """State before the first update; the basis is that of the first gradient."""
    sides = [side for side, size in enumerate(grad.shape) if grad.ndim == 2 and 1 < size <= max_size]
    factor = {side: _gram(grad, side).mul_(1 - shampoo_beta) for side in sides}
    return {
        "step": 0,
        "exp_avg": torch.zeros_like(grad),
        "exp_avg_sq": torch.zeros_like(grad),
        "factor": factor,
        # Once per run, so in double precision: single may fail to converge on a factor of low rank.
        "basis": {side: torch.linalg.eigh(f.double()).eigenvectors.to(f) for side, f in factor.items()},
    }


def _as_matrix(tensor: Tensor) -> Tensor:
    return tensor.flatten(1) if tensor.ndim > 1 else tensor


def _gram(grad: Float[Tensor, "m n"], side: int) -> Float[Tensor, "k k"]:
    return grad @ grad.T if side == ROWS else grad.T @ grad


def _project(matrix: Float[Tensor, "*shape"], basis: Sides) -> Float[Tensor, "*shape"]:
    """Q_L^T A Q_R."""
    if ROWS in basis:
        matrix = basis[ROWS].T @ matrix
    return matrix @ basis[COLUMNS] if COLUMNS in basis else matrix


def _project_back(matrix: Float[Tensor, "*shape"], basis: Sides) -> Float[Tensor, "*shape"]:
    """Q_L A Q_R^T."""
    return _project(matrix, {side: q.T for side, q in basis.items()})


def _refreshed(
    factor: Float[Tensor, "k k"], basis: Float[Tensor, "k k"]
) -> tuple[Float[Tensor, "k k"], Int[Tensor, "k"]]:
    """The basis after one step of orthogonal iteration, and which old column each new one continues.

    QR trusts the columns on the left most, so the old ones are sorted first, by falling Rayleigh quotient.
    """
    image = factor @ basis
    order = (basis * image).sum(0).argsort(descending=True, stable=True)
    return torch.linalg.qr(image[:, order]).Q, order
