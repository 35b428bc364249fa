"""Float16, int8 weights and full int8 of image models: what they write, what they refuse."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmq import plugin, recipe
from llmq.artifact import Artifact
from llmq.errors import LlmqError, UserError
from llmq.files import LAYERS
from llmq.guarded.weights import weight_files
from llmq.openvino_runtime import core, openvino
from llmq.quantize.int8 import ignored_names
from llmq.types import Context, Data, Split
from llmq.vision.exporting import export, quantized_stage
from llmq.vision.images import Example, make_split
from llmq.vision.likeness import Likeness, in_order_of
from llmq.vision.state import save_network
from tests.exported_families import SIDE, Heads, TwoHeads, base

CPU = Context("cpu", 0)
STEPS = ("quantize.float16", "quantize.dynamic", "quantize.int8")


class Noise(Data):
    """Eight random images."""

    suits = frozenset({"detector"})
    channels: int = 3
    shape: str = "image/boxes"
    n: int = 8

    def read(self) -> Split:
        rng = np.random.default_rng(0)
        made = [
            Example(str(i), rng.integers(0, 256, (SIDE, SIDE, self.channels), dtype=np.uint8)) for i in range(self.n)
        ]
        return make_split(made, [], self.shape, ["noise"])


def step(word: str, **settings: Any) -> Any:
    data = {"data": Noise()} if word == "quantize.int8" else {}
    return plugin.build({word: {**data, **settings}})


@pytest.fixture(scope="module")
def heads(tmp_path_factory) -> Artifact:
    """A family with two outputs, at rest."""
    return base(tmp_path_factory.mktemp("heads") / "base")


@pytest.fixture(scope="module")
def made(heads, tmp_path_factory) -> dict[str, Artifact]:
    """What each of the three makes of it."""
    stages = {}
    for word in STEPS:
        folder = tmp_path_factory.mktemp(word)
        stages[word] = step(word).apply(heads, folder, CPU)
    return stages


def said(artifact: Artifact, inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with artifact.open("cpu") as loaded, torch.inference_mode():
        return loaded.module(inputs)


def relative_error(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


@pytest.mark.parametrize(
    ("word", "smaller", "error"),
    [("quantize.float16", 1.8, 1e-3), ("quantize.dynamic", 3.0, 0.02), ("quantize.int8", 2.5, 0.06)],
)
def test_a_stage_is_smaller_and_says_nearly_the_same(heads, made, word, smaller, error):
    stage = made[word]
    assert (stage.runtime, stage.packed) == ("openvino", True)
    assert [f.name for f in stage.weight_files()] == ["model.xml", "model.bin"]
    assert stage.notes["size_ratio"] > smaller
    x = torch.cat(list(Heads().calibration(Noise().read(), 3, 7)))
    for truth, found in zip(said(heads, x), said(stage, x), strict=True):
        assert 0 < relative_error(found, truth) < error
    assert all(0 < e < error for e in stage.notes["relative_error"])
    assert all(k > 0.97 for k in stage.notes["variance_kept"])


@pytest.mark.parametrize(("word", "bits"), [("quantize.float16", 16), ("quantize.dynamic", 8), ("quantize.int8", 8)])
def test_the_error_of_each_layer_is_kept_beside_the_graph(made, word, bits):
    facts = json.loads((made[word].weights / LAYERS).read_text())
    layers = [n for n, m in Heads().network().named_modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert sorted(facts) == sorted(layers)
    for its in facts.values():
        assert its["bits"] == bits
        assert 0 < its["error"] < (1e-3 if bits == 16 else 0.03)


@pytest.mark.parametrize("word", STEPS)
def test_the_files_are_foretold_without_a_weight(heads, made, word):
    sketch, _ = step(word).foresee(Heads().sketch())
    written = sum(file.stat().st_size for file in made[word].weight_files())
    assert sketch.on_disk == pytest.approx(written, rel=0.02)


@pytest.mark.parametrize("word", STEPS)
def test_plain_openvino_opens_it_and_says_the_same(made, word):
    precision = {"INFERENCE_PRECISION_HINT": "bf16" if word == "quantize.dynamic" else "f32"}
    compiled = core().compile_model(str(made[word].weights / "model.xml"), "CPU", precision)
    x = Heads().example(1)
    for plain, ours in zip(compiled(x.numpy()).values(), said(made[word], x), strict=True):
        torch.testing.assert_close(torch.from_numpy(plain), ours, atol=0.02, rtol=0.02)


def test_int8_is_integer_arithmetic_in_the_graph(made):
    graph = core().read_model(made["quantize.int8"].weights / "model.xml")
    types = [operation.get_type_name() for operation in graph.get_ops()]
    assert types.count("FakeQuantize") == 3  # the input, and what two layers give: heads share theirs
    stored = [o.get_element_type().get_type_name() for o in graph.get_ops() if o.get_type_name() == "Constant"]
    assert stored.count("i8") == 4  # each convolution


def test_the_notes_say_what_was_done(made):
    notes = made["quantize.int8"].notes
    assert notes["calibration"] == {
        "samples": 8,
        "seed": 0,
        "data": {"word": notes["calibration"]["data"]["word"], "sha256": Noise().read().sha256},
    }
    assert notes["nncf"]
    assert notes["openvino"]
    assert notes["judged_on"] == 8


@pytest.mark.parametrize("word", STEPS)
def test_the_same_seed_gives_the_same_bytes(heads, made, word, tmp_path):
    again = step(word).apply(heads, tmp_path, CPU)
    for a, b in zip(again.weight_files(), made[word].weight_files(), strict=True):
        assert a.read_bytes() == b.read_bytes()


def test_a_layer_can_be_left_in_float(heads, tmp_path):
    stage = step("quantize.int8", ignored=["far", "trunk.0"]).apply(heads, tmp_path, CPU)
    graph = core().read_model(stage.weights / "model.xml")
    stored = [o.get_element_type().get_type_name() for o in graph.get_ops() if o.get_type_name() == "Constant"]
    assert stored.count("i8") == 2


def test_all_bits_are_used_where_no_processor_is_to_be_spared(heads, made, tmp_path):
    spared, full = made["quantize.int8"], step("quantize.int8", overflow_fix="disable").apply(heads, tmp_path, CPU)
    largest = []
    for stage in (spared, full):
        graph = core().read_model(stage.weights / "model.xml")
        first = next(o for o in graph.get_ordered_ops() if o.get_type_name() == "Constant" and o.shape == [96, 3, 3, 3])
        largest.append(np.abs(first.data.astype(int)).max())
    assert largest[0] < 65
    assert largest[1] == 127


def test_an_ignored_layer_that_is_not_there_is_named():
    operations = ["__module.head/aten::conv/Conv", "__module.tail.2/aten::conv/Conv", "Multiply_3"]
    assert ignored_names(operations, ("tail",)) == ["__module.tail.2/aten::conv/Conv"]
    with pytest.raises(UserError, match="ignored: the network has no layer 'hed'; did you mean 'head'"):
        ignored_names(operations, ("hed",))
    with pytest.raises(UserError, match=r"no layer 'tail\.22'"):
        ignored_names(operations, ("tail.22",))


def test_a_gan_calibrates_on_latents_and_reopens_to_the_same_images(tmp_path):
    gan = plugin.build({"models.dcgan": {"features": 16}})
    stage = plugin.build({"quantize.int8": {"samples": 10}}).apply(gan.base(CPU), tmp_path, CPU)
    stage.save(tmp_path)
    x = gan.example(2)
    assert torch.equal(said(stage, x), said(Artifact.load(tmp_path), x))
    assert relative_error(said(stage, x), said(gan.base(CPU), x)) < 0.2


# What is no quantization.


def refused(artifact: Artifact, folder: Path, change: Any, **settings: Any) -> str:
    with pytest.raises(LlmqError) as error:
        quantized_stage(step("quantize.float16"), artifact, folder, change, **settings)
    assert error.value.exit_code == 4
    assert not list(folder.iterdir())
    return str(error.value)


@pytest.mark.parametrize(("back", "cure"), [((), "is too small for it"), (("a", "b"), "2 layers went back to float")])
def test_what_shrinks_nothing_is_refused_with_the_facts(back, cure, heads, tmp_path):
    message = refused(heads, tmp_path, lambda graph: graph, notes={"accuracy_drop": {"back_to_float": back}})
    assert message.startswith("quantize.float16 shrank nothing: ")
    assert f"{sum(f.stat().st_size for f in weight_files(heads.weights)):,} before; " in message
    assert cure in message


def test_what_changes_nothing_is_refused(tmp_path):
    artifact = base(tmp_path / "base")
    with artifact.open("cpu") as loaded:
        for parameter in loaded.module.parameters():
            parameter.data = parameter.data.half().float()
        loaded.module.far.bias.data.zero_()  # the graph adds it to a constant
        save_network(loaded.module, artifact.weights)
    (tmp_path / "stage").mkdir()
    message = refused(artifact, tmp_path / "stage", lambda graph: graph, float16=True)
    assert message.startswith("quantize.float16 changed no output: ")


@pytest.mark.parametrize("spoil", ["other", "nan", "constant"])
def test_garbage_is_refused(heads, tmp_path, spoil):
    torch.manual_seed(5)
    other = TwoHeads(96).eval()
    with torch.no_grad():
        if spoil == "nan":
            other.near.bias[0] = math.nan
        if spoil == "constant":
            other.near.weight.zero_()

    def change(graph: Any) -> Any:
        return openvino().convert_model(other, example_input=Heads().example(1))

    message = refused(heads, tmp_path, change, float16=True)
    assert message.startswith("quantize.float16 spoilt the model: output 0 keeps ")


@pytest.mark.parametrize("sure", [True, False])
def test_logits_far_out_are_no_garbage_where_a_classifier_is_as_sure_of_the_same(tmp_path, sure):
    narrow = {"architecture": "resnet10t", "classes": 4, "input_size": 32, "model_args": {"channels": [8, 8, 8, 8]}}
    artifact = plugin.build({"timm_classifier": narrow}, "models").base(CPU)
    with artifact.open("cpu") as loaded:
        network = loaded.module
        network.fc.weight.data *= 1000 if sure else 1
        artifact = replace(artifact, weights=tmp_path / "base")
        artifact.weights.mkdir()
        save_network(network, artifact.weights)

    def change(graph: Any) -> Any:
        further = torch.nn.Sequential(network, Threefold())
        return openvino().convert_model(further.eval(), example_input=artifact.model.example(1))

    (tmp_path / "stage").mkdir()
    if sure:
        made = quantized_stage(step("quantize.float16"), artifact, tmp_path / "stage", change, float16=True)
        assert made.notes["variance_kept"][0] < 0
    else:
        assert "spoilt the model" in refused(artifact, tmp_path / "stage", change, float16=True)


class Threefold(torch.nn.Module):
    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return 3 * logits


def test_a_failed_quantization_leaves_the_folder_of_a_run_unfinished(heads, tmp_path, monkeypatch):
    from llmq.pipeline import make_stage

    monkeypatch.setattr("llmq.quantize.float16._unchanged", lambda graph: export(TwoHeads(96).eval(), Heads()))
    with pytest.raises(LlmqError, match="spoilt the model"):
        make_stage(step("quantize.float16"), heads, tmp_path / "1-quantize.float16", CPU)
    assert not (tmp_path / "1-quantize.float16").exists()


# What a user can get wrong.


def test_data_is_needed_unless_a_family_draws_its_own():
    artifact = Artifact(Heads(), Path())
    with pytest.raises(UserError, match="it needs 'data' to calibrate on"):
        plugin.build({"quantize.int8": {}}).check_base(artifact)
    plugin.build({"quantize.int8": {}}).check_base(Artifact(plugin.build({"models.dcgan": {}}), Path()))


def test_data_of_another_shape_is_seen_before_anything_runs():
    artifact = Artifact(Heads(), Path())
    with pytest.raises(UserError, match="its examples are image/label, and image/boxes is needed"):
        step("quantize.int8", data=Noise(shape="image/label")).check_base(artifact)
    with pytest.raises(UserError, match="has no training image"):
        step("quantize.int8", data=Noise(n=0)).check_base(artifact)


JOB = "model: {{dcgan: {{}}}}\nsteps:\n- {}\n- {}\n"


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (("quantize.int8", "quantize.float16"), "4: 'quantize.float16' needs float weights, and these are packed"),
        (("quantize.float16", "quantize.int8"), "4: 'quantize.int8' needs float weights, and these are packed"),
        (("quantize.int8: {preset: fast}", "quantize.float16"), "3: preset: 'fast' of quantize.int8 is wrong"),
        (("quantize.int8: {sampels: 3}", "quantize.float16"), "3: unknown key 'sampels' .* did you mean 'samples'"),
        (("quantize.int8: {samples: 0}", "quantize.float16"), "3: samples: 0 of quantize.int8 is wrong"),
        (("quantize.int8: {data: pydoc}", "quantize.float16"), "3: 'data.pydoc' suits causal-lm.* is a gan"),
    ],
)
def test_a_recipe_is_checked_before_anything_runs(tmp_path, steps, message):
    (tmp_path / "job.yaml").write_text(JOB.format(*steps))
    with pytest.raises(UserError, match=rf"job\.yaml:{message}"):
        recipe.load(str(tmp_path / "job.yaml"))


@pytest.mark.parametrize("word", STEPS)
def test_a_language_model_is_refused(tmp_path, word):
    (tmp_path / "job.yaml").write_text(f"model: {{causal_lm: {{weights: org/name}}}}\nsteps:\n- {word}\n")
    with pytest.raises(UserError, match=rf"job\.yaml:3: '{word}' suits .* and this model is a causal-lm"):
        recipe.load(str(tmp_path / "job.yaml"))


# The yardstick.

FINITE = st.floats(-100, 100, width=32)


@given(st.lists(st.tuples(FINITE, FINITE), min_size=2, max_size=40), st.integers(1, 39))
def test_likeness_is_the_closed_form_however_it_is_cut(pairs, cut):
    truth, found = (np.array(side, dtype=np.float64) for side in zip(*pairs, strict=True))
    likeness = Likeness()
    for part in (slice(cut), slice(cut, None)):
        likeness.add(torch.from_numpy(truth[part]), torch.from_numpy(found[part]))
    residual, spread = ((found - truth) ** 2).sum(), ((truth - truth.mean()) ** 2).sum()
    if spread > 1e-6:
        assert likeness.kept == pytest.approx(1 - residual / spread, rel=1e-6, abs=1e-6)
        assert likeness.relative_error == pytest.approx(np.linalg.norm(found - truth) / np.linalg.norm(truth), rel=1e-6)


@pytest.mark.parametrize(
    ("truth", "found", "garbage"),
    [
        ([0.0, 1.0, 2.0], [0.1, 1.0, 1.9], False),
        ([0.0, 1.0, 2.0], [1.0, 1.0, 1.0], True),
        ([0.0, 1.0, 2.0], [2.0, 1.0, 0.0], True),
        ([0.0, 1.0, 2.0], [0.0, 1.0, math.nan], True),
        ([0.0, 1.0, 2.0], [0.0, 1.0, math.inf], True),
        ([5.0, 5.0, 5.0], [5.1, 4.9, 5.0], False),
        ([5.0, 5.0, 5.0], [0.0, 0.0, 0.0], True),
        ([0.0, 0.0], [0.0, 0.0], False),
        ([0.0, 0.0], [0.0, 0.1], True),
    ],
)
def test_garbage(truth, found, garbage):
    likeness = Likeness()
    likeness.add(torch.tensor(truth), torch.tensor(found))
    assert likeness.is_garbage == garbage


def test_rows_without_an_order_are_compared_each_with_its_like():
    rng = torch.Generator().manual_seed(0)
    truth = torch.randn(2, 40, 5, generator=rng), torch.rand(2, 40, 4, generator=rng)
    orders = torch.stack([torch.randperm(40, generator=rng) for _ in range(2)])
    noise = [torch.randn(t.shape, generator=rng) * 1e-4 for t in truth]
    near = [t + e for t, e in zip(truth, noise, strict=True)]
    mixed = [torch.stack([t[i, order] for i, order in enumerate(orders)]) for t in near]
    for found, expected in zip(in_order_of(truth, mixed), near, strict=True):
        assert torch.equal(found, expected)
    # One row said for all is no likeness: every row is taken once.
    same = [t[:, :1].expand_as(t) for t in truth]
    assert torch.equal(in_order_of(truth, same)[0], same[0])
    mixed[0][0, 3, 0] = math.nan
    assert in_order_of(truth, mixed)[0].isnan().sum() == 1
