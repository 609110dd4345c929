import pytest
import torch
from torch import nn

from aneurysm.nets.metadata import METADATA_FEATURES, FilmGate, LearnedMissing, MetadataGate, encode_metadata

NAN = float("nan")
gates = pytest.mark.parametrize("gate_type", [MetadataGate, FilmGate])


def _encoded() -> torch.Tensor:
    age = torch.tensor([40.0, NAN, 80.0])
    sex = torch.tensor([0.0, 1.0, NAN])
    return encode_metadata(age, sex, torch.eye(4, dtype=torch.bool)[:3])


def _awake(gate_type: type[nn.Module], dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    gate = gate_type(5, dropout=dropout)
    nn.init.normal_((gate.gate if gate_type is MetadataGate else gate.modulation).weight)
    return gate


def test_encoding() -> None:
    encoded = _encoded()
    assert encoded.shape == (3, METADATA_FEATURES)
    assert encoded.tolist() == [
        [-1, 0, -1, 0, 1, 0, 0, 0],
        [0, 1, 1, 0, 0, 1, 0, 0],
        [1, 0, 0, 1, 0, 0, 1, 0],
    ]


def test_wrong_units_are_refused() -> None:
    modality = torch.ones(1, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="Age must be"):
        encode_metadata(torch.tensor([650.0]), torch.tensor([0.0]), modality)
    with pytest.raises(ValueError, match="Sex must be"):
        encode_metadata(torch.tensor([65.0]), torch.tensor([2.0]), modality)


@gates
def test_gates_start_as_identity(gate_type: type[nn.Module]) -> None:
    features = torch.randn(3, 5, 2, 3, 4)
    torch.testing.assert_close(gate_type(5)(features, _encoded()), features, atol=0, rtol=0)


@gates
def test_gates_act_per_channel(gate_type: type[nn.Module]) -> None:
    gate = _awake(gate_type).eval()
    ones = torch.ones(3, 5, 2, 3, 4)
    out = gate(ones, _encoded())
    torch.testing.assert_close(out, out[:, :, :1, :1, :1].expand_as(out))
    assert not torch.allclose(out[0], out[1])
    if gate_type is MetadataGate:
        assert ((out > 0) & (out < 2)).all()


@gates
def test_a_missing_field_uses_the_learned_vector_not_its_column(
    gate_type: type[nn.Module],
) -> None:
    gate = _awake(gate_type).eval()
    features, encoded = torch.randn(3, 5, 2, 2, 2), _encoded()
    reference = gate(features, encoded)
    other = encoded.clone()
    other[1, 0] = 99.0  # age of the patient without age
    torch.testing.assert_close(gate(features, other), reference, atol=0, rtol=0)
    with torch.no_grad():
        gate.embedding.missing[0] += 1.0
    changed = gate(features, encoded)
    assert not torch.allclose(changed[1], reference[1])
    torch.testing.assert_close(changed[[0, 2]], reference[[0, 2]])


@gates
def test_dropout_makes_fields_missing_in_training_only(gate_type: type[nn.Module]) -> None:
    gate = _awake(gate_type, dropout=0.999999)
    features, encoded = torch.randn(3, 5, 2, 2, 2), _encoded()
    unknown = torch.tensor([[0.0, 1, 0, 1, 0, 0, 0, 0]]).expand(3, -1)
    torch.testing.assert_close(gate(features, encoded), gate.eval()(features, unknown))
    assert not torch.allclose(gate(features, encoded), gate(features, unknown))


@gates
def test_gradients(gate_type: type[nn.Module]) -> None:
    gate = _awake(gate_type)
    gate(torch.randn(4, 5, 2, 2, 2), torch.cat((_encoded(), torch.zeros(1, 8)))).square().mean().backward()
    for name, parameter in gate.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_learned_missing_fills_only_nan() -> None:
    fill = LearnedMissing(2)
    with torch.no_grad():
        fill.value.copy_(torch.tensor([5.0, 6.0]))
    assert fill(torch.tensor([[NAN, 1.0], [2.0, NAN]])).tolist() == [[5.0, 1.0], [2.0, 6.0]]


def test_dropout_is_a_probability() -> None:
    with pytest.raises(ValueError, match="probability"):
        MetadataGate(5, dropout=1.0)
