import math

import pytest
import torch

from aneurysm.nets.coupling import AttentionCoupling, position_angles


def _complex_turns(angles, x):
    """The rotary rule in complex numbers: component p of the first half with component p of the second."""
    half = x.shape[-1] // 2
    return torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)


def test_positions_count_by_their_offset_only():
    """The score of two tokens depends on their offset, so shifting both changes nothing."""
    angles = position_angles((3, 4, 5), 6, torch.zeros(1, dtype=torch.float64)).view(3, 4, 5, 6)
    torch.testing.assert_close(angles[1, 2, 3] - angles[0, 1, 1], angles[2, 3, 4] - angles[1, 2, 2])
    assert (angles[1, 1, 1] != 0).all()  # every pair sees an axis


@pytest.mark.parametrize("space", [(12,), (3, 4), (2, 3, 2)])
@pytest.mark.parametrize("positions", ["rotary", "none"])
def test_attention_follows_the_formula(space, positions):
    torch.manual_seed(0)
    attention = AttentionCoupling(24, heads=2, positions=positions, axes=len(space)).double()
    x = torch.randn(1, 24, *space, dtype=torch.float64)
    tokens = x.flatten(2).transpose(1, 2)[0]
    q, k, v = attention.qkv(tokens).chunk(3, dim=1)
    mixed = []
    for head in range(2):
        part = slice(12 * head, 12 * head + 12)
        score = q[:, part] @ k[:, part].T
        if positions == "rotary":
            angles = position_angles(space, 6, x)
            a, b = (_complex_turns(angles, t[:, part]) for t in (q, k))
            score = (a @ b.conj().T).real
        mixed.append((score / math.sqrt(12)).softmax(1) @ v[:, part])
    expected = attention.out(torch.cat(mixed, dim=1))
    torch.testing.assert_close(attention(x).flatten(2).transpose(1, 2)[0], expected)


def test_learned_positions_begin_as_rotations_that_the_answer_undoes():
    """With one key only, the value is turned and turned back: the grid leaves no trace."""
    torch.manual_seed(0)
    attention = AttentionCoupling(16, heads=2, positions="learned", grid=(2, 2, 2)).double()
    assert attention.turns is not None
    maps = attention.turns.value.double()
    torch.testing.assert_close(
        maps @ maps.mT, torch.eye(2, dtype=torch.float64).expand_as(maps), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(attention.turns.answer, maps.mT.to(attention.turns.answer))
    v = torch.randn(1, 2, 8, 8, dtype=torch.float64)
    there = attention.turns(v, attention.turns.value.double())
    torch.testing.assert_close(attention.turns(there, attention.turns.answer.double()), v, atol=1e-6, rtol=0)
    x = torch.randn(2, 16, 2, 2, 2, dtype=torch.float64)
    attention(x).pow(2).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in attention.turns.parameters())
    with pytest.raises(ValueError, match="grid of 8 cells but the map has 27"):
        attention(torch.randn(2, 16, 3, 3, 3, dtype=torch.float64))


def test_the_angles_of_an_inference_serve_a_training():
    attention = AttentionCoupling(24, heads=2)
    x = torch.randn(1, 24, 5, 2, 3)
    with torch.inference_mode():
        attention(x)
    attention(x).sum().backward()
    assert attention.qkv.weight.grad is not None


def test_errors_teach():
    with pytest.raises(ValueError, match="do not divide"):
        AttentionCoupling(24, heads=5)
    with pytest.raises(ValueError, match="at least 6 channels per head"):
        AttentionCoupling(16, heads=4)
    with pytest.raises(ValueError, match="need the grid"):
        AttentionCoupling(24, positions="learned")
    with pytest.raises(ValueError, match=r"expected \(b, 24, \*space\)"):
        AttentionCoupling(24)(torch.randn(1, 8, 2, 2, 2))


def test_published_weights_fit_after_their_heads_are_put_in_a_row():
    """There channel c * heads + h belongs to head h; here the channels of a head are neighbours."""
    torch.manual_seed(0)
    heads, width = 2, 6
    channels = heads * width
    official = {
        "W_qkv.weight": torch.randn(3 * channels, channels, dtype=torch.float64),
        "W_qkv.bias": torch.randn(3 * channels, dtype=torch.float64),
        "W_o.weight": torch.randn(channels, channels, dtype=torch.float64),
        "W_o.bias": torch.randn(channels, dtype=torch.float64),
    }
    tokens = torch.randn(3, 5, channels, dtype=torch.float64)
    q, k, v = (tokens @ official["W_qkv.weight"].T + official["W_qkv.bias"]).chunk(3, dim=2)
    split = [t.unflatten(2, (width, heads)).permute(0, 3, 1, 2) for t in (q, k, v)]  # (b, heads, n, width)
    mixed = (split[0] @ split[1].mT / math.sqrt(width)).softmax(-1) @ split[2]
    expected = mixed.permute(0, 2, 3, 1).flatten(2) @ official["W_o.weight"].T + official["W_o.bias"]

    row = torch.arange(channels).view(width, heads).T.flatten()  # where our channel h * width + c was
    rows = torch.cat([row, row + channels, row + 2 * channels])
    attention = AttentionCoupling(channels, heads, positions="none").double()
    attention.load_state_dict(
        {
            "qkv.weight": official["W_qkv.weight"][rows],
            "qkv.bias": official["W_qkv.bias"][rows],
            "out.weight": official["W_o.weight"][:, row],
            "out.bias": official["W_o.bias"],
        }
    )
    torch.testing.assert_close(attention(tokens.mT).mT, expected)
