"""Taking channels out of layers, and shapes on disk: narrowed, saved and reopened, a network says the same."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torchvision.ops import FrozenBatchNorm2d

from llmq.errors import UserError
from llmq.vision.shapes import (
    changes,
    channels_of,
    describe,
    kind_of,
    narrow,
    reshape,
    with_weight_norm,
    without_weight_norm,
)
from llmq.vision.state import open_network, save_network

KEPT = [0, 2, 3, 7]
GONE = {1, 4, 5, 6}


def drawn(layer: nn.Module) -> Any:
    """A layer in evaluation mode whose every number is random, its running statistics too."""
    generator = torch.Generator().manual_seed(0)
    for tensor in (*layer.parameters(), *layer.buffers()):
        if tensor.is_floating_point():
            tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
    return layer.eval()


def image(channels: int = 8) -> Any:
    return torch.randn(2, channels, 6, 6, generator=torch.Generator().manual_seed(1))


READERS = {
    "convolution": lambda: nn.Conv2d(8, 5, 3),
    "grouped": lambda: nn.Conv2d(8, 6, 3, groups=2),
    "transposed": lambda: nn.ConvTranspose2d(8, 5, 4, 2, bias=False),
}
MAKERS = {
    "convolution": lambda: nn.Conv2d(8, 8, 3),
    "no-bias": lambda: nn.Conv2d(8, 8, 1, bias=False),
    "transposed": lambda: nn.ConvTranspose2d(8, 8, 4, 2, 1),
}
THROUGH = {
    "depthwise": lambda: nn.Conv2d(8, 8, 3, groups=8),
    "depthwise-transposed": lambda: nn.ConvTranspose2d(8, 8, 2, groups=8),
    "batch-norm": lambda: nn.BatchNorm2d(8),
    "without-scales": lambda: nn.BatchNorm2d(8, affine=False),
    "frozen-norm": lambda: FrozenBatchNorm2d(8),
    "instance-norm": lambda: nn.InstanceNorm2d(8, affine=True),
    "prelu": lambda: nn.PReLU(8),
}


@pytest.mark.parametrize("name", READERS)
def test_a_reader_without_inputs_is_one_that_sees_zeros_there(name):
    kept = [0, 2, 4, 6] if name == "grouped" else KEPT  # the same places of both groups
    layer, x = drawn(READERS[name]()), image()
    zeros = torch.zeros_like(x)
    zeros[:, kept] = x[:, kept]
    whole = layer(zeros)
    narrow(layer, "inputs", set(range(8)) - set(kept))
    assert layer.in_channels == 4
    torch.testing.assert_close(layer(x[:, kept]), whole)


@pytest.mark.parametrize("name", MAKERS)
def test_a_maker_without_outputs_makes_the_others_as_before(name):
    layer, x = drawn(MAKERS[name]()), image()
    whole = layer(x)
    narrow(layer, "outputs", GONE)
    assert layer.out_channels == channels_of(layer, "outputs") == 4
    torch.testing.assert_close(layer(x), whole[:, KEPT])


@pytest.mark.parametrize("side", ["inputs", "outputs"])
@pytest.mark.parametrize("name", THROUGH)
def test_channels_that_go_through_go_from_both_sides(name, side):
    layer, x = drawn(THROUGH[name]()), image()
    whole = layer(x)
    narrow(layer, side, GONE)
    assert channels_of(layer, "inputs") == channels_of(layer, "outputs") == 4
    torch.testing.assert_close(layer(x[:, KEPT]), whole[:, KEPT])


def test_linear_layers_and_the_norms_that_mix_channels():
    linear, x = drawn(nn.Linear(8, 8)), image()[:, :, 0, 0]
    narrow(linear, "inputs", GONE)
    narrow(linear, "outputs", {0})
    assert (linear.in_features, linear.out_features) == (4, 7)
    assert linear(x[:, KEPT]).shape == (2, 7)
    over_groups, over_all = drawn(nn.GroupNorm(2, 8)), drawn(nn.LayerNorm(8))
    for norm in (over_groups, over_all):
        narrow(norm, "outputs", {1, 3, 5, 7})
    assert over_groups(image(4)).shape == (2, 4, 6, 6)
    assert over_all(x[:, KEPT]).shape == (2, 4)
    assert kind_of(nn.ReLU()) is None


def test_a_grouped_convolution_refuses_to_become_lopsided():
    with pytest.raises(AssertionError, match="every group"):
        narrow(nn.Conv2d(8, 8, 3, groups=2), "inputs", {0, 1, 2, 4})


class Zoo(nn.Module):
    """A layer of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.slope = nn.PReLU(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.mixed = nn.GroupNorm(2, 8)
        self.frozen = FrozenBatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.normed = weight_norm(nn.Conv2d(8, 8, 3))
        self.up = nn.ConvTranspose2d(8, 8, 2, 2)
        self.layer_norm = nn.LayerNorm(8)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Any) -> Any:
        x = self.frozen(self.mixed(self.depthwise(self.slope(self.norm(self.first(x))))))
        x = self.up(self.normed(self.grouped(x)).relu())
        return self.last(self.layer_norm(x.mean((2, 3))))


def narrowed() -> Any:
    """A zoo with four of the eight channels everywhere."""
    zoo = drawn(Zoo())
    normed = without_weight_norm(zoo)
    half = {1, 3, 5, 7}
    for name in ("norm", "slope", "depthwise", "mixed", "frozen", "layer_norm"):
        narrow(getattr(zoo, name), "outputs", half)
    for name in ("grouped", "normed", "up"):
        narrow(getattr(zoo, name), "outputs", half)
        narrow(getattr(zoo, name), "inputs", half)
    narrow(zoo.first, "outputs", half)
    narrow(zoo.last, "inputs", half)
    with_weight_norm(zoo, normed)
    zoo.reshaped = changes(zoo, Zoo())
    return zoo


def test_a_narrowed_network_reopens_to_the_same_outputs_again_and_again(tmp_path):
    zoo, x = narrowed(), image(1)
    with torch.no_grad():
        said = zoo(x)
        assert said.isfinite().all()
        for i in range(2):  # the second time as after a training that knows nothing of shapes
            folder = tmp_path / str(i)
            folder.mkdir()
            save_network(zoo, folder)
            zoo = open_network(Zoo(), folder).eval()
            assert torch.equal(zoo(x), said)
    assert (tmp_path / "0" / "shapes.json").read_bytes() == (tmp_path / "1" / "shapes.json").read_bytes()
    assert describe(zoo) == describe(narrowed())


def test_only_what_changed_is_described():
    zoo = Zoo()
    assert changes(zoo, Zoo()) == {}
    narrow(zoo.first, "outputs", GONE)
    assert changes(zoo, Zoo()).keys() == {"first"}
    assert changes(zoo, Zoo())["first"] == {
        "out_channels": 4,
        "in_channels": 1,
        "groups": 1,
        "tensors": {"weight": [4, 1, 3, 3], "bias": [4]},
    }


def test_a_pruned_network_can_be_copied_and_trained():
    zoo = Zoo()
    reshape(zoo, narrowed().reshaped)
    torch.manual_seed(0)
    for parameter in zoo.parameters():
        nn.init.normal_(parameter, 0.5, 0.1)
    twin = copy.deepcopy(zoo).train()
    twin(image(1)).square().sum().backward()
    assert all(p.grad is not None for p in twin.parameters())
    assert twin.reshaped == zoo.reshaped


@pytest.mark.parametrize("change", ["layer", "tensor"])
def test_shapes_of_another_network_are_refused_by_name(change):
    shapes = dict(narrowed().reshaped)
    if change == "layer":
        shapes["second"] = shapes.pop("first")
    else:
        shapes["first"] = {**shapes["first"], "tensors": {"weight": [4, 1, 3, 3]}}
    with pytest.raises(UserError, match=f"shapes.json tells of '{'second' if change == 'layer' else 'first'}'"):
        reshape(Zoo(), shapes)


def test_weight_norm_off_and_on_again_changes_nothing_but_roundings():
    zoo, x = drawn(Zoo()), image(1)
    with torch.no_grad():
        said = zoo(x)
        normed = without_weight_norm(zoo)
        assert normed == {"normed": 0}
        assert torch.equal(zoo(x), said)
        with_weight_norm(zoo, normed)
        torch.testing.assert_close(zoo(x), said)
    assert zoo.state_dict().keys() == Zoo().state_dict().keys()


def test_a_parameter_that_is_no_layers_has_no_kind():
    assert kind_of(torch.nn.Parameter(torch.ones(3))) is None
