import io
from collections.abc import Callable, Iterator
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from aneurysm.physics.soap import SOAP

DOUBLE = torch.float64


def train(optimiser: torch.optim.Optimizer, loss: Callable[[], Tensor], steps: int) -> list[float]:
    """The loss before each step and after the last."""
    history = []
    for _ in range(steps):
        optimiser.zero_grad()
        value = loss()
        value.backward()
        optimiser.step()
        history.append(value.item())
    return [*history, loss().item()]


def step_along(optimiser: torch.optim.Optimizer, parameter: nn.Parameter, grad: Tensor) -> None:
    parameter.grad = grad.clone()
    optimiser.step()


def orthogonal(size: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, dtype=DOUBLE)).Q


def stretched(size: int, decades: float) -> Tensor:
    """Symmetric, its eigenvalues from 1 down by so many decades, its eigenvectors along no axis."""
    q = orthogonal(size)
    return q * torch.logspace(0, -decades, size, dtype=DOUBLE) @ q.T


@pytest.mark.parametrize(
    ("shape", "max_size"), [((), 100), ((7,), 100), ((1, 1), 100), ((5, 7), 4), ((3, 4, 2), 2)]
)
def test_is_adam_where_nothing_is_preconditioned(shape, max_size):
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(shape, dtype=DOUBLE))
    theirs = deepcopy(ours)
    options = dict(lr=0.01, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.1)
    soap = SOAP([ours], max_size=max_size, precondition_every=2, **options)
    adam = torch.optim.AdamW([theirs], **options)
    for _ in range(12):
        grad = torch.randn(shape, dtype=DOUBLE)
        step_along(soap, ours, grad)
        step_along(adam, theirs, grad)
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("precondition_every", [1, 3])
def test_is_adam_in_the_axes_themselves_also_when_eigenvectors_change_places(precondition_every):
    """Diagonal gradients keep the axes as eigenvectors, while each eigenvalue is the largest in turn."""
    torch.manual_seed(1)
    ours = nn.Parameter(torch.zeros(4, 4, dtype=DOUBLE))
    theirs = deepcopy(ours)
    options = dict(lr=0.01, betas=(0.95, 0.95), eps=1e-3)  # rounding errors beside the diagonal are below eps
    soap = SOAP([ours], precondition_every=precondition_every, **options)
    adam = torch.optim.Adam([theirs], **options)
    leaders = []
    for i in range(60):
        size = torch.rand(4, dtype=DOUBLE) + 5 * (torch.arange(4) == i // 15)
        step_along(soap, ours, size.diag())
        if i > 0:  # the first gradient only finds the basis
            step_along(adam, theirs, size.diag())
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
        leaders.append(int(soap.state[ours]["basis"][0][:, 0].abs().argmax()))
    assert set(leaders) == {0, 1, 2, 3}


@pytest.mark.parametrize("precondition_every", [1, 4])
def test_rotated_coordinates_change_nothing(precondition_every):
    """min |A (W - T) B_i|^2 with W = U X V^T: the path of X is that of W in other coordinates.

    QR turns with the coordinates just as the eigenvectors do, so only rounding tells the two paths apart. All
    gradients have full rank and the second differs from the first: where a gradient has no part along an
    eigenvector, its rounding error against eps decides on the step.
    """
    torch.manual_seed(2)
    left, target = stretched(6, 1), torch.randn(6, 6, dtype=DOUBLE)
    batches = torch.randn(60, 6, 6, dtype=DOUBLE)

    def path(u: Tensor, v: Tensor) -> list[float]:
        weight = nn.Parameter(torch.zeros(6, 6, dtype=DOUBLE))
        batch: Iterator[Tensor] = iter([*batches, batches[0]])
        optimiser = SOAP([weight], lr=0.05, weight_decay=0.1, precondition_every=precondition_every)
        return train(optimiser, lambda: (left @ (u @ weight @ v.T - target) @ next(batch)).square().sum(), 60)

    straight = path(torch.eye(6, dtype=DOUBLE), torch.eye(6, dtype=DOUBLE))
    rotated = path(orthogonal(6), orthogonal(6))
    assert straight[-1] < 0.3 * straight[0]
    assert rotated == pytest.approx(straight, rel=1e-8)


@pytest.mark.parametrize("lr", [0.1, 0.3, 1.0])
def test_solves_an_ill_conditioned_regression_that_stalls_adam(lr):
    """min |A (W - T) B|^2 with a Hessian of condition number 1e6; the step size falls to zero."""

    def final_loss(method: type[torch.optim.Optimizer]) -> float:
        torch.manual_seed(3)
        left, right, target = stretched(12, 1.5), stretched(8, 1.5), torch.randn(12, 8, dtype=DOUBLE)
        weight = nn.Parameter(torch.zeros(12, 8, dtype=DOUBLE))
        optimiser = method([weight], lr=lr, betas=(0.95, 0.95))
        schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, total_iters=250)
        optimiser.register_step_post_hook(lambda *_: schedule.step())
        return train(optimiser, lambda: (left @ (weight - target) @ right).square().sum(), 250)[-1]

    assert final_loss(SOAP) < 1e-2 * final_loss(torch.optim.Adam)


def test_the_basis_is_orthogonal_and_diagonalises_the_factors():
    torch.manual_seed(4)
    weight = nn.Parameter(torch.zeros(5, 6, dtype=DOUBLE))
    optimiser = SOAP([weight], precondition_every=1, betas=(0.9, 0.99))
    left, right = stretched(5, 1), stretched(6, 1)
    for _ in range(400):
        step_along(optimiser, weight, left @ torch.randn(5, 6, dtype=DOUBLE) @ right)
    for factor, basis in zip(
        *(optimiser.state[weight][key].values() for key in ("factor", "basis")), strict=True
    ):
        torch.testing.assert_close(basis.T @ basis, torch.eye(len(basis), dtype=DOUBLE), rtol=0, atol=1e-13)
        inside = basis.T @ factor @ basis
        values = inside.diagonal()
        torch.testing.assert_close(values, torch.linalg.eigvalsh(factor).flip(0), rtol=0.1, atol=0)
        assert (inside - values.diag()).abs().max() < 0.05 * values[0] and (values.diff() < 0).all()


def test_the_first_gradient_finds_the_basis_and_moves_vectors_only():
    torch.manual_seed(5)
    layer = nn.Linear(4, 3, dtype=DOUBLE)
    before = deepcopy(layer)
    optimiser = SOAP(layer.parameters(), lr=0.1)
    x = torch.randn(8, 4, dtype=DOUBLE)
    train(optimiser, lambda: layer(x).square().sum(), 1)
    assert torch.equal(layer.weight, before.weight)
    torch.testing.assert_close((layer.bias - before.bias).abs(), torch.full((3,), 0.1, dtype=DOUBLE))
    train(optimiser, lambda: layer(x).square().sum(), 1)
    assert not torch.equal(layer.weight, before.weight)


@pytest.mark.parametrize(
    ("shape", "sides"),
    [((3, 9), {0}), ((9, 3), {1}), ((3, 1), {0}), ((3, 3), {0, 1}), ((9, 9), set()), ((3, 2, 2), {0, 1})],
)
def test_preconditions_the_sides_of_at_most_max_size(shape, sides):
    weight = nn.Parameter(torch.randn(shape))
    optimiser = SOAP([weight], max_size=4)
    step_along(optimiser, weight, torch.randn(shape))
    rows, columns = shape[0], weight[0].numel()
    state = optimiser.state[weight]
    assert {side: q.shape[0] for side, q in state["basis"].items()} == {s: (rows, columns)[s] for s in sides}
    assert state["exp_avg"].shape == state["exp_avg_sq"].shape == (rows, columns)


def test_a_kernel_is_the_matrix_of_its_first_axis_by_the_others():
    torch.manual_seed(6)
    kernel = nn.Parameter(torch.randn(4, 3, 2, 2, dtype=DOUBLE).to(memory_format=torch.channels_last))
    matrix = nn.Parameter(kernel.detach().flatten(1))
    optimisers = SOAP([kernel], precondition_every=2), SOAP([matrix], precondition_every=2)
    for _ in range(7):
        grad = torch.randn(4, 3, 2, 2, dtype=DOUBLE)
        step_along(optimisers[0], kernel, grad.to(memory_format=torch.channels_last))
        step_along(optimisers[1], matrix, grad.flatten(1))
    assert torch.equal(kernel.flatten(1), matrix)


def network(dtype: torch.dtype = DOUBLE, device: str = "cpu") -> tuple[nn.Module, Callable[[], Tensor]]:
    """A small fit and its loss."""
    torch.manual_seed(7)
    net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2))
    x = torch.rand(64, 3, dtype=DOUBLE)
    y = torch.stack((x.prod(1), (3 * x[:, 0]).sin()), 1).to(device, dtype)
    x = x.to(device, dtype)
    net = net.to(device, dtype)
    return net, lambda: (net(x) - y).square().mean()


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("done", [1, 14])
def test_resumes_bit_for_bit(dtype, done):
    """Between two turns of the basis as well as right after the first gradient."""
    net, loss = network(dtype)
    optimiser = SOAP(net.parameters(), precondition_every=5)
    train(optimiser, loss, done)
    file = io.BytesIO()
    torch.save((net.state_dict(), optimiser.state_dict()), file)
    onwards = train(optimiser, loss, 12)

    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    again, loss = network(dtype)
    again.load_state_dict(weights)
    resumed = SOAP(again.parameters(), lr=1.0, betas=(0.0, 0.0))  # overwritten by what was saved
    resumed.load_state_dict(state)
    assert train(resumed, loss, 12) == onwards
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))


def test_single_precision_follows_double_precision():
    runs = {}
    for dtype in (torch.float32, DOUBLE):
        net, loss = network(dtype)
        optimiser = SOAP(net.parameters(), lr=1e-2)
        runs[dtype] = train(optimiser, loss, 80)
        state = optimiser.state[net[2].weight]
        assert {q.dtype for q in (*state["basis"].values(), *state["factor"].values())} == {dtype}
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == dtype
    single, double = runs[torch.float32], runs[DOUBLE]
    assert single[:5] == pytest.approx(double[:5], rel=1e-2)
    assert max(single[-1], double[-1]) < 0.1 * double[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_follows_cpu():
    runs = {}
    for device in ("cpu", "cuda"):
        net, loss = network(device=device)
        runs[device] = train(SOAP(net.parameters()), loss, 25)
    assert runs["cuda"] == pytest.approx(runs["cpu"], rel=1e-4)


def test_calls_the_closure_with_gradients_and_returns_its_loss():
    net, loss = network()
    twin, twin_loss = network()
    optimiser = SOAP(net.parameters())

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = loss()
        value.backward()
        return value

    with torch.no_grad():
        losses = [optimiser.step(closure).item() for _ in range(4)]
    assert losses == train(SOAP(twin.parameters()), twin_loss, 4)[:4]
    assert optimiser.step() is None


def test_leaves_parameters_without_gradient_alone():
    used, unused = (nn.Parameter(torch.ones(3, 3)) for _ in range(2))
    optimiser = SOAP([used, unused], weight_decay=0.1)
    train(optimiser, lambda: used.square().sum(), 3)
    assert torch.equal(unused, torch.ones(3, 3)) and unused not in optimiser.state
    assert not torch.equal(used, torch.ones(3, 3))


def test_zero_gradients_move_nothing():
    weight = nn.Parameter(torch.ones(4, 3))
    optimiser = SOAP([weight], precondition_every=1)
    for _ in range(4):
        step_along(optimiser, weight, torch.zeros(4, 3))
    assert torch.equal(weight, torch.ones(4, 3))


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("lr", -1e-3, "lr"),
        ("lr", float("nan"), "lr"),
        ("betas", (1.0, 0.9), r"betas\[0\]"),
        ("betas", (0.9, -0.1), r"betas\[1\]"),
        ("shampoo_beta", 1.0, "shampoo_beta"),
        ("eps", -1e-8, "eps"),
        ("weight_decay", -0.1, "weight_decay"),
        ("precondition_every", 0, "precondition_every"),
        ("max_size", 0, "max_size"),
    ],
)
def test_refuses_options_out_of_range(option, value, named):
    weight = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match=named):
        SOAP([weight], **{option: value})
    with pytest.raises(ValueError, match=named):
        SOAP([{"params": [weight], option: value}])


def test_groups_have_options_of_their_own():
    fast, slow = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimiser = SOAP([{"params": [fast], "lr": 0.1}, {"params": [slow]}], lr=0.01)
    train(optimiser, lambda: fast.sum() + slow.sum(), 1)
    assert fast.tolist() == pytest.approx([0.9, 0.9]) and slow.tolist() == pytest.approx([0.99, 0.99])
