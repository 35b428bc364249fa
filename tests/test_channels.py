"""prune.channels: what goes goes everywhere, what cannot go stays, and what is left says what it said before."""

import json
from collections.abc import Callable
from math import lcm
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from helpers import CPU
from hypothesis import given
from hypothesis import strategies as st
from test_hf_detector import model_of
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torchvision.ops import FrozenBatchNorm2d

from llmq import plugin
from llmq.artifact import Artifact
from llmq.errors import UserError
from llmq.files import LAYERS
from llmq.prune.channels import nothing
from llmq.prune.channels.cuts import figures, least_important
from llmq.vision.family import ImageModel
from llmq.vision.state import save_network


class Concat(nn.Module):
    """Two branches side by side, read together, with a shortcut around one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.inner = (
            nn.Conv2d(3, 16, 3, 1, 1),
            nn.Conv2d(3, 32, 3, 1, 1),
            nn.Conv2d(32, 32, 3, 1, 1),
        )
        self.norm, self.last = nn.BatchNorm2d(48), nn.Conv2d(48, 5, 1)

    def forward(self, x: Any) -> Any:
        two = self.two(x)
        return self.last(self.norm(torch.cat([self.one(x), two + self.inner(two.relu())], 1)))


class Gated(nn.Module):
    """A depthwise convolution gated by what it made, as in MobileNetV3, and a residual around it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.wide, self.narrow = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 64, 1), nn.Conv2d(64, 16, 1)
        self.depthwise, self.norm = nn.Conv2d(64, 64, 3, 1, 1, groups=64), nn.BatchNorm2d(64)
        self.squeeze, self.expand, self.head = nn.Conv2d(64, 16, 1), nn.Conv2d(16, 64, 1), nn.Linear(16, 4)

    def forward(self, x: Any) -> Any:
        x = self.first(x)
        y = self.norm(self.depthwise(self.wide(x))).relu()
        gate = self.expand(self.squeeze(y.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.head((x + self.narrow(y * gate)).mean((2, 3)))


class Shuffled(nn.Module):
    """Channels of two halves interleaved by a reshape, which a graph of shapes takes for nothing at all."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after, self.last = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 2, 1)

    def forward(self, x: Any) -> Any:
        y = self.before(x)
        y = y.view(len(y), 2, 8, *y.shape[2:]).transpose(1, 2).reshape(y.shape)
        return self.last(self.after(y).relu())


class Mixed(nn.Module):
    """Attention over channels: what stays feels whatever goes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 2, 1)

    def forward(self, x: Any) -> Any:
        return self.last(self.inner(self.first(x).softmax(1)).relu())


def upscaler() -> nn.Module:
    layers = weight_norm(nn.Conv2d(3, 64, 3, 1, 1)), nn.PixelShuffle(2), nn.PReLU(), nn.Conv2d(16, 32, 3, 1, 1)
    return nn.Sequential(*layers, nn.PReLU(32), nn.Conv2d(32, 12, 3, 1, 1), nn.PixelShuffle(2))


def plain(*, norm: Callable[[int], nn.Module] = nn.BatchNorm2d, flat: int = 1) -> nn.Module:
    layers = nn.Conv2d(3, 16, 3), norm(16), nn.ReLU(), nn.Conv2d(16, 32, 3, groups=2), norm(32), nn.LeakyReLU()
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(flat), nn.Flatten(), nn.Linear(32 * flat**2, 3))


def generator() -> nn.Module:
    layers = nn.ConvTranspose2d(3, 32, 4, 2), nn.BatchNorm2d(32), nn.ReLU(inplace=True)
    return nn.Sequential(*layers, nn.ConvTranspose2d(32, 16, 4, 2), nn.ReLU(), nn.ConvTranspose2d(16, 1, 3), nn.Tanh())


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "concat": Concat,
    "gated": Gated,
    "shuffled": Shuffled,
    "mixed": Mixed,
    "upscaler": upscaler,
    "plain": plain,
    "flattened": lambda: plain(flat=2),
    "group-norm": lambda: plain(norm=lambda n: nn.GroupNorm(4, n)),
    "frozen-norm": lambda: plain(norm=FrozenBatchNorm2d),
    "generator": generator,
    "one-layer": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()),
    "no-layer": nn.ReLU,
}


class Net(ImageModel):
    """One of the networks above."""

    kind: ClassVar[str] = "classifier"
    net: str

    def network(self) -> Any:
        return NETWORKS[self.net]()

    def example(self, batch_size: int) -> Any:
        return torch.randn(batch_size, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def pruned(model: Any, folder: Path, **settings: Any) -> Artifact:
    step: Any = plugin.build({"prune.channels": settings})
    base = model.base(CPU)
    step.check_base(base)
    folder.mkdir(parents=True, exist_ok=True)
    return step.apply(base, folder, CPU)


def said(artifact: Artifact, n: int = 2) -> list[Any]:
    with artifact.open("cpu") as loaded, torch.no_grad():
        made = loaded.module(artifact.model.example(n))  # type: ignore[attr-defined]
    return list(made) if isinstance(made, tuple) else [made]


def widths(artifact: Artifact) -> dict[str, int]:
    return {name: after for name, (_, after) in artifact.notes["channels"].items()}


def assert_whole(artifact: Artifact, base: Artifact) -> None:
    """Smaller by its own word and by the files, of the same output shapes, and the same when opened and saved again."""
    notes = artifact.notes
    assert notes["macs"][1] < notes["macs"][0]
    assert notes["parameters"][1] < notes["parameters"][0]
    with artifact.open("cpu") as loaded, base.open("cpu") as before:
        model: Any = artifact.model
        assert figures(loaded.module, model.example(1)) == {k: notes[k][1] for k in ("macs", "parameters")}
        assert figures(before.module, model.example(1)) == {k: notes[k][0] for k in ("macs", "parameters")}
        again = artifact.weights.parent / "again"
        again.mkdir()
        save_network(loaded.module, again)
    assert sum(f.stat().st_size for f in artifact.weight_files()) < sum(f.stat().st_size for f in base.weight_files())
    first, second = said(artifact), said(Artifact(model, again))
    assert [t.shape for t in first] == [t.shape for t in said(base)]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("net", "expected"),
    [
        ("concat", {"one": 8, "two": 16, "inner": 16}),
        (
            "gated",
            {"first": 8, "wide": 32, "narrow": 8, "depthwise": 32, "squeeze": 8, "expand": 32},
        ),
        ("shuffled", {"after": 8}),
        ("upscaler", {"0": 32, "3": 16}),
        ("plain", {"0": 8, "3": 16}),
        ("flattened", {"0": 8, "3": 16}),
        ("group-norm", {"0": 8, "3": 16}),
        ("frozen-norm", {"0": 8, "3": 16}),
        ("generator", {"0": 16, "3": 8}),
        ("mixed", {"inner": 8}),
    ],
)
def test_what_hangs_together_goes_together(net, expected, tmp_path):
    model = Net(net=net)
    made = pruned(model, tmp_path / "made")
    assert widths(made) == expected
    assert_whole(made, model.base(CPU))


def test_what_goes_is_what_nothing_would_have_read(tmp_path):
    """By hand: the channels whose weights are largest are moved to known places, and the others end at the reader."""
    with Net(net="plain").base(CPU).open("cpu") as loaded:
        network = loaded.module
    torch.manual_seed(0)
    least = [0, 3, 5, 6, 9, 10, 12, 15]
    with torch.no_grad():
        for layer in (network[0], network[1]):
            layer.weight[least] *= 0.01
        network[1].running_mean.normal_()
        network[1].running_var.uniform_(0.5, 2)
    base = Artifact(Net(net="plain"), tmp_path / "base")
    base.weights.mkdir()
    save_network(network, base.weights)
    (tmp_path / "made").mkdir()
    step: Any = plugin.build({"prune.channels": {"modules": {"^3$": "skip"}}})
    # The reader is grouped: the same places go in both halves, so these are the pairs whose sum is least.
    sums = {place: sum(i in least for i in (place, place + 8)) for place in range(8)}
    made = step.apply(base, tmp_path / "made", CPU)
    with made.open("cpu") as opened:
        kept = opened.module[0].weight
        rows = [int((network[0].weight == row).flatten(1).all(1).nonzero()) for row in kept]
    assert len(rows) == 8
    assert {r % 8 for r in rows[:4]} == {r % 8 for r in rows[4:]}
    assert max(sums[r % 8] for r in rows) <= min(sums[p] for p in range(8) if p not in {r % 8 for r in rows})
    with torch.no_grad():
        gone = [i for i in range(16) if i not in rows]
        network[3].weight[:, [g for g in gone if g < 8]] = 0
        torch.testing.assert_close(said(made)[0], network(base.model.example(2)))  # type: ignore[attr-defined]


def test_shortcuts_keep_their_width_where_that_is_asked_for(tmp_path):
    made = pruned(Net(net="gated"), tmp_path / "made", scope="inner")
    assert widths(made) == {"wide": 32, "depthwise": 32, "squeeze": 8, "expand": 32}
    assert "something is added" in made.notes["left"]["first"]


def test_ratio_rounding_and_exceptions_by_name(tmp_path):
    modules = {"wide": {"ratio": 0.25}, "squeeze": "skip"}
    made = pruned(Net(net="gated"), tmp_path / "made", ratio=0.75, round_to=4, modules=modules)
    assert widths(made) == {"first": 4, "wide": 48, "narrow": 4, "depthwise": 48, "expand": 48}
    assert made.notes["left"]["squeeze"] == "modules: skip"
    assert "network's output" in made.notes["left"]["head"]
    removed = {name: its["removed"] for name, its in json.loads((made.weights / LAYERS).read_text()).items()}
    assert removed == {"first": 0.75, "wide": 0.25, "narrow": 0.75, "depthwise": 0.25, "squeeze": 0, "expand": 0.25,
                       "head": 0}  # fmt: skip


def test_the_scale_of_a_batch_norm_can_decide(tmp_path):
    model = Net(net="plain")
    with model.base(CPU).open("cpu") as loaded:
        network = loaded.module
    scales = torch.arange(16.0)[[3, 1, 0, 2, 8, 9, 10, 11, 7, 6, 5, 4, 12, 13, 14, 15]]
    network[1].weight.data = scales
    base = Artifact(model, tmp_path / "base")
    base.weights.mkdir()
    save_network(network, base.weights)
    (tmp_path / "made").mkdir()
    step: Any = plugin.build({"prune.channels": {"importance": "bn_scale"}})
    with step.apply(base, tmp_path / "made", CPU).open("cpu") as opened:
        # Places 0 to 3 of both halves have the least sums.
        assert opened.module[1].weight.tolist() == [8, 9, 10, 11, 12, 13, 14, 15]


@pytest.mark.parametrize(
    ("net", "settings", "says"),
    [
        ("one-layer", {}, "its outputs are the network's output (1 layers, such as 0)"),
        ("no-layer", {}, "no convolution or linear layer"),
        ("generator", {"round_to": 64}, "32 channels less 50% are, in multiples of 64, as many"),
        ("generator", {"modules": {"": "skip"}}, "modules: skip (2 layers"),
        ("generator", {"modules": {"conv9": "skip"}}, "no layer's name matches 'conv9'"),
        ("upscaler", {"importance": "bn_scale"}, "nothing in its group tells its channels apart"),
    ],
)
def test_where_nothing_can_go_it_says_why_before_anything_runs(net, settings, says):
    step: Any = plugin.build({"prune.channels": settings})
    with pytest.raises(UserError) as raised:
        step.check_base(Net(net=net).base(CPU))
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_refusal_names_the_network():
    model: Any = plugin.build({"timm_classifier": {"architecture": "mixer_s32_224", "input_size": 64}}, "models")
    with pytest.raises(
        UserError, match=r"^no channel of models\.timm_classifier mixer_s32_224 can be pruned: x \(1 lay"
    ):
        raise nothing(model, {"stem": "x"})


def test_what_no_shape_tells_is_found_by_trying(tmp_path):
    made = pruned(Net(net="shuffled"), tmp_path / "made")
    assert made.notes["left"]["before"] == "taking them out would change the outputs of other layers"
    assert made.notes["left"]["last"] == "its outputs are the network's output"


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=8),
    st.integers(1, 4),
    st.integers(1, 6),
    st.floats(0.05, 0.95),
)
def test_the_least_go_in_all_parts_alike_and_a_round_number_stays(place_scores, parts, round_to, ratio):
    scores = place_scores * parts
    gone = least_important(scores, ratio, round_to, parts)
    each, step = len(place_scores), lcm(round_to, parts)
    if not gone:
        assert (1 - ratio) * len(scores) + step / 2 >= len(scores) or len(scores) <= step
        return
    stay = len(scores) - len(gone)
    assert stay % step == 0
    assert abs(stay - (1 - ratio) * len(scores)) <= step / 2 + 1e-9 or stay == step
    assert {(i + each) % len(scores) for i in gone} == gone
    assert max(scores[i] for i in gone) <= min(s for i, s in enumerate(scores) if i not in gone)


FAMILIES = {
    "dcgan": {"dcgan": {"features": 16}},
    "edsr": {"edsr": {"scale": 4, "n_resblocks": 2, "n_feats": 32}},
    "wdsr-b": {"wdsr": {"variant": "B", "scale": 3, "n_resblocks": 2}},
    "fcos": {"torchvision_detector": {"architecture": "fcos", "size": 64}},
}
SLOW = {
    "resnet": {"timm_classifier": {"architecture": "resnet18", "classes": 10, "input_size": 32}},
    "mobilenet": {"timm_classifier": {"architecture": "mobilenetv3_small_050", "classes": 10, "input_size": 32}},
    "efficientnet": {"timm_classifier": {"architecture": "tf_efficientnet_lite0", "classes": 10, "input_size": 32}},
    "vit": {"timm_classifier": {"architecture": "test_vit", "classes": 10}},
    "wdsr-a": {"wdsr": {"variant": "A", "scale": 2, "n_resblocks": 2}},
    "srresnet": {"srresnet": {"scale": 2, "n_resblocks": 2}},
    "srcnn": {"srcnn": {"scale": 3}},
    "retinanet": {"torchvision_detector": {"architecture": "retinanet", "size": 64}},
    "ssdlite": {"torchvision_detector": {"architecture": "ssdlite"}},
    "faster-rcnn": {"torchvision_detector": {"architecture": "faster_rcnn", "size": 64}},
    "fcos-fixed-norms": {"torchvision_detector": {"architecture": "fcos", "backbone": "resnet18", "coco": True}},
    "resnet50": {"timm_classifier": {"architecture": "resnet50", "classes": 10, "input_size": 64}},
}


@pytest.mark.parametrize("name", [*FAMILIES, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def test_every_family_becomes_smaller_and_reopens_the_same(name, tmp_path):
    model: Any = plugin.build({**FAMILIES, **SLOW}[name], "models")
    made = pruned(model, tmp_path / "made")
    assert_whole(made, model.base(CPU))
    assert made.notes["macs"][1] < 0.8 * made.notes["macs"][0]
    assert Artifact.load(saved(made)).notes["channels"]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["rt_detr", "d_fine", "detr", "yolos"])
def test_detectors_of_transformers_lose_what_no_attention_mixes(family, tmp_path):
    model = model_of(family)
    made = pruned(model, tmp_path / "made", round_to=4)
    assert_whole(made, model.base(CPU))


def saved(artifact: Artifact) -> Path:
    artifact.save(artifact.weights)
    return artifact.weights


@pytest.mark.slow
def test_channels_then_training_then_int8_on_one_model(tmp_path):
    settings = {"classes": 10, "channels": 1, "input_size": 32, "model_args": {"channels": [16, 32, 64, 128]}}
    model: Any = plugin.build({"timm_classifier": {"architecture": "resnet10t", **settings}}, "models")
    steps: list[Any] = [
        plugin.build({"prune.channels": {}}),
        plugin.build({"adapt.train": {"data": "digits", "max_steps": 90, "learning_rate": 3e-3, "batch_size": 32}}),
        plugin.build({"quantize.int8": {"data": "digits", "samples": 16}}),
    ]
    stages = [model.base(CPU)]
    for i, step in enumerate(steps):
        (tmp_path / str(i)).mkdir()
        made = step.apply(stages[-1], tmp_path / str(i), CPU)
        made.save(tmp_path / str(i))
        stages.append(Artifact.load(tmp_path / str(i)))
    narrow, trained, quantized = stages[1:]
    assert (trained.weights / "shapes.json").read_bytes() == (narrow.weights / "shapes.json").read_bytes()
    assert not torch.equal(said(trained)[0], said(narrow)[0])
    examples = plugin.build("data.digits").read().held_out[:64]  # type: ignore[attr-defined]
    answers = []
    for stage in (trained, quantized):
        with stage.open("cpu") as loaded, torch.no_grad():
            inputs = loaded.processor([e.image for e in examples])
            answers.append(torch.cat([loaded.module(x[None]) for x in inputs]).argmax(1))
    assert float((answers[0] == torch.tensor([e.label for e in examples])).float().mean()) > 0.5
    assert float((answers[0] == answers[1]).float().mean()) > 0.9


class Keeps(nn.Module):
    """As LeViT's attention, it keeps a tensor of its last call until it is told its mode."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.kept = nn.Parameter(torch.ones(1)), {}

    def train(self, mode: bool = True) -> Any:
        self.kept = {}
        return super().train(mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.kept.setdefault("bias", self.bias * 2)


def test_a_kept_tensor_and_a_group_norm_without_a_bias_hinder_no_proof():
    from llmq.prune.channels.cuts import outputs, proven

    torch.manual_seed(0)
    norm = nn.GroupNorm(1, 16)
    norm.bias = None
    network = nn.Sequential(nn.Conv2d(3, 16, 3), norm, Keeps(), nn.Conv2d(16, 4, 3)).eval()
    x = torch.randn(1, 3, 8, 8)
    outputs(network, x)
    assert network[2].kept["bias"].requires_grad
    step: Any = plugin.build({"prune.channels": {}})
    cuts, _ = step.cuts(network, SimpleNamespace(example=lambda batch_size: x))
    assert len(cuts) == 1
    assert proven(network, x, cuts) == cuts
