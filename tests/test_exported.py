"""An exported graph is called like the module that it was made from, here and by plain OpenVINO."""

import ast
import ctypes
import gc
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import llmq.openvino_runtime
from llmq import plugin
from llmq.errors import LlmqError
from llmq.openvino_runtime import GRAPH, core, openvino, write_graph
from llmq.tasks.size import bytes_in_memory, dense_weights
from llmq.types import Context
from llmq.vision import exported
from llmq.vision.exported import ExportedModule
from llmq.vision.exporting import export
from llmq.vision.graph_layers import are_proportional, restore_names
from tests.exported_families import SIDE, Heads, TwoHeads, base


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """A module with two outputs."""
    torch.manual_seed(0)
    return TwoHeads(8).eval()


@pytest.fixture(scope="module")
def folder(network, tmp_path_factory):
    """Its graph."""
    folder = tmp_path_factory.mktemp("graph")
    write_graph(export(network, Heads()), folder / GRAPH)
    return folder


@pytest.fixture
def graph(folder) -> ExportedModule:
    """Its graph, opened."""
    return ExportedModule(folder)


def images(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(1, 3, SIDE, SIDE), (5, 3, SIDE, SIDE), (2, 3, 9, 31), (1, 3, 1, 1)])
def test_it_says_what_the_module_says_for_any_batch_and_size(network, graph, shape):
    with torch.no_grad():
        truth = network(images(*shape))
    found = graph(images(*shape))
    assert isinstance(found, tuple)
    for t, f in zip(truth, found, strict=True):
        assert f.shape == t.shape
        assert f.dtype == t.dtype
        torch.testing.assert_close(f, t, atol=1e-5, rtol=1e-5)


def test_one_output_is_a_tensor(tmp_path):
    write_graph(export(nn.Conv2d(3, 2, 1).eval(), Heads()), tmp_path / GRAPH)
    assert isinstance(ExportedModule(tmp_path)(images(1, 3, 4, 4)), torch.Tensor)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: x.double(),
        lambda x: x.requires_grad_(),
        lambda x: torch.cat([x, x])[1:],
        lambda x: x.expand(1, 3, SIDE, SIDE),
    ],
)
def test_the_memory_of_an_input_may_be_any(graph, change):
    x = images(1, 3, SIDE, SIDE)
    with torch.inference_mode():
        truth = graph(x.clone())
    assert all(torch.equal(f, t) for f, t in zip(graph(change(x.clone())), truth, strict=True))


def test_what_it_gave_outlives_the_next_call(graph):
    first = graph(images(1, 3, SIDE, SIDE))
    kept = [t.clone() for t in first]
    first_input = images(1, 3, SIDE, SIDE)
    graph(images(1, 3, SIDE, SIDE, seed=2))
    assert all(torch.equal(f, k) for f, k in zip(first, kept, strict=True))
    again = graph(first_input)
    assert all(torch.equal(a, k) for a, k in zip(again, kept, strict=True))
    for output in again:
        output.zero_()  # the caller's own
    assert torch.equal(first_input, images(1, 3, SIDE, SIDE))


def test_few_shapes_stay_compiled_and_threads_are_those_of_torch(graph, monkeypatch):
    monkeypatch.setattr(exported, "SHAPES", 2)
    for side in (4, 5, 4, 6, 4):
        graph(images(1, 3, side, side))
    assert [shape[-1] for shape, _ in graph.compiled] == [6, 4]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        graph(images(1, 3, 4, 4))
    finally:
        torch.set_num_threads(before)
    assert [threads for _, threads in graph.compiled] == [before, before + 1]


def test_an_input_that_does_not_fit_is_named(graph):
    with pytest.raises(LlmqError, match=r"takes inputs of \[\?,3,\?,\?\], and this one is \[1, 4, 16, 16\]$"):
        graph(images(1, 4, SIDE, SIDE))
    with pytest.raises(LlmqError, match=r"this one is \[3, 16, 16\]$"):
        graph(images(3, SIDE, SIDE))


def test_plain_openvino_opens_the_file_and_says_the_same(graph, folder):
    compiled = core().compile_model(str(folder / "model.xml"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    x = images(2, 3, SIDE, SIDE)
    for plain, ours in zip(compiled(x.numpy()).values(), graph(x), strict=True):
        torch.testing.assert_close(torch.from_numpy(plain), ours, atol=1e-5, rtol=1e-5)


def test_float32_is_float32_wherever_it_runs(graph):
    compiled = graph._for((1, 3, SIDE, SIDE)).request.get_compiled_model()
    assert compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name() == "f32"


def test_the_same_graph_is_written_in_the_same_bytes(network, tmp_path):
    written = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_graph(export(network, Heads()), tmp_path / name / GRAPH)
        written.append([(tmp_path / name / f"model.{end}").read_bytes() for end in ("xml", "bin")])
    assert written[0] == written[1]


@pytest.fixture(scope="module")
def normed() -> nn.Module:
    """Batch normalization after convolutions of each sort, as after a training."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=4), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 3))
    network = nn.Sequential(*(nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU()) for conv in layers))
    network.append(nn.Sequential(nn.ConvTranspose2d(8, 4, 4, bias=False), nn.BatchNorm2d(4)))
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight)
            nn.init.normal_(layer.bias)
            nn.init.normal_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 2)
    return network.eval()


def test_layers_keep_their_names_where_a_normalization_was_folded(normed, tmp_path):
    written = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        graph = export(normed, Heads())
        write_graph(graph, tmp_path / name / GRAPH)
        written.append((tmp_path / name / "model.xml").read_bytes())
    assert written[0] == written[1]
    names = [o.get_friendly_name() for o in graph.get_ordered_ops() if "Convolution" in o.get_type_name()]
    assert [name.split("/")[0] for name in names] == [f"__module.{i}.0" for i in range(5)]


def test_rows_are_proportional_only_if_all_are():
    rows = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    assert are_proportional(rows, rows * torch.tensor([[1.0], [-2.0], [0.5], [0.0]])) is False
    assert are_proportional(rows * torch.tensor([[1.0], [-2.0], [0.5], [0.0]]), rows)
    assert not are_proportional(rows.flip(0), rows)
    assert not are_proportional(rows, rows[:3])


def test_size_counts_a_graph_as_it_counts_a_module(tmp_path):
    artifact = base(tmp_path / "base")
    size = plugin.build({"tasks.size": {}})
    with artifact.open("cpu") as loaded:
        with torch.no_grad():
            loaded.module.trunk[0].weight[:, 0] = 0
        write_graph(export(loaded.module, artifact.model), tmp_path / GRAPH)
        before = {m.metric: m.value for m in size.score(loaded)}
    with artifact.then(size, weights=tmp_path, runtime="openvino").open("cpu") as loaded:
        after = {m.metric: m.value for m in size.score(loaded)}
    for metric in ("parameters", "nonzeros"):
        assert after[metric] == before[metric]
    assert after["nonzeros"] == after["parameters"] - 96 * 9
    assert before["bytes_in_memory"] <= after["bytes_in_memory"] < before["bytes_in_memory"] + 1000
    assert after["bytes_on_disk"] == sum((tmp_path / f"model.{end}").stat().st_size for end in ("xml", "bin"))


class BakesTheBatch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * len(list(x))


class BakesTheSize(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * float(x.shape[3])


class Unsupported(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigvals(x.mean(1)).real


@pytest.mark.parametrize("module", [BakesTheBatch(), BakesTheSize()])
def test_a_graph_that_computes_something_else_is_an_error(module):
    with pytest.raises(LlmqError, match=r"was exported wrongly: for an input \[.*\] the graph's output 0 is off by"):
        export(module, Heads())


def test_a_module_that_cannot_be_exported_is_one_line():
    with pytest.raises(LlmqError, match=r"cannot be exported: .*eig") as error:
        export(Unsupported(), Heads())
    assert "\n" not in str(error.value)


def test_who_imports_openvino_imports_first_what_keeps_it_from_reporting_home():
    own = Path(llmq.openvino_runtime.__file__)
    importing = []
    texts = {file: file.read_text() for file in own.parent.rglob("*.py")}
    for file in (file for file, text in texts.items() if "from openvino" in text):
        within = [n for f in ast.walk(ast.parse(texts[file])) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)]
        if any(isinstance(n, ast.ImportFrom) and (n.module or "").partition(".")[0] == "openvino" for n in within):
            importing.append(file)
    assert len(importing) > 3
    assert not [str(file) for file in importing if "from llmq.openvino_runtime import" not in texts[file]]
    assert sys.modules["openvino_telemetry"] is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "door",
    [
        "from llmq.vision.exporting import nncf; nncf()",
        "from llmq.text.graph.weights import packed_extensions; packed_extensions(torch.nn.ReLU())",
    ],
)
def test_nobody_phones_home(door, tmp_path):
    code = f"""
import socket, sys
import torch
def refuse(*arguments, **named):
    raise SystemExit("a socket")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
{door}
from llmq.openvino_runtime import openvino
openvino().convert_model(torch.nn.ReLU(), example_input=torch.zeros(1))
assert sys.modules["openvino_telemetry"] is None
"""
    surroundings = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    ended = subprocess.run([sys.executable, "-c", code], env=surroundings, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert not (tmp_path / "intel").exists()


def test_no_two_operations_share_a_name_though_zero_weights_fit_every_layer():
    layers = [layer for _ in range(3) for layer in (nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))]
    network = nn.Sequential(*layers).eval()
    for layer in layers[1::2]:
        nn.init.zeros_(layer.weight)
    graph = openvino().convert_model(network, example_input=images(1, 3, 8, 8))
    restore_names(graph, network)
    names = [operation.get_friendly_name() for operation in graph.get_ops()]
    assert len(set(names)) == len(names)
    assert "__module.0/Convolution" in names


@pytest.mark.parametrize("asked", ["float32", "bfloat16"])
def test_a_stage_says_where_and_in_what_precision_it_runs(tmp_path, asked):
    artifact = base(tmp_path / "base")
    (tmp_path / "stage").mkdir()
    step = plugin.build({"quantize.float16": {"compute_dtype": asked}})
    stage = step.apply(artifact, tmp_path / "stage", Context("cpu", 0))
    assert stage.notes["device"] == "cpu"
    assert stage.notes["compute_dtype"] == asked
    # Of a run on an accelerator, of which a graph knows nothing.
    loaded = stage.model.open(stage, "cuda:0")
    assert loaded.device == "cpu"
    (clock,) = plugin.build("tasks.speed").clocks(loaded)
    has = "BF16" in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    runs = asked if has else "float32"
    assert clock.convention.endswith(f"{torch.get_num_threads()} threads, cpu, openvino in {runs}")
    compiled = loaded.module._for((1, 3, SIDE, SIDE)).request.get_compiled_model()
    short = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    assert {"f32": "float32", "bf16": "bfloat16"}[short] == runs
    with artifact.open("cpu") as plain:
        (clock,) = plugin.build("tasks.speed").clocks(plain)
    assert clock.convention.endswith("threads, cpu, torch in float32")


def stack_for_signals():
    """Address and size of the stack on which this thread handles signals, as `sigaltstack` tells."""

    class Stack(ctypes.Structure):
        _fields_ = [("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]

    found = Stack()
    assert ctypes.CDLL(None).sigaltstack(None, ctypes.byref(found)) == 0
    return found.address or 0, found.size


def test_a_signal_can_be_handled_after_graphs_were_closed(folder):
    """With a `Core` for each graph the stack for signals is unmapped by now: Ctrl-C would end the process mutely."""
    first, second = ExportedModule(folder), ExportedModule(folder)
    first(images(1, 3, 8, 8)), second(images(1, 3, 8, 8))
    del first
    gc.collect()
    del second
    gc.collect()
    address, size = stack_for_signals()
    ranges = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
    mapped = ((int(start, 16), int(end, 16)) for start, end in ranges)
    assert not size or any(start <= address and address + size <= end for start, end in mapped)


@pytest.mark.parametrize(("kind", "zero"), [("i4", False), ("u4", True), ("u8", True), ("i8", False), ("i8", True)])
def test_codes_count_as_the_weights_that_they_stand_for(kind, zero, tmp_path):
    """Not their scales and zero points: 8 x 16 weights, of which those that equal the zero are zero."""
    from openvino import Model, Tensor, Type, opset13

    codes = np.arange(8 * 16, dtype=np.uint8).reshape(8, 16) % 7
    dtype = {"i4": Type.i4, "u4": Type.u4, "u8": Type.u8, "i8": Type.i8}[kind]

    def constant(numbers):
        packed = numbers.reshape(-1, 2) if kind[1:] == "4" else None
        held = numbers if packed is None else (packed[:, 0] | packed[:, 1] << 4).astype(np.uint8)
        made = Tensor(dtype, list(numbers.shape))
        made.data.view(np.uint8).reshape(-1)[:] = held.reshape(-1)
        return opset13.constant(made, shared_memory=False)

    weight = opset13.convert(constant(codes), "f32")
    if zero:
        weight = opset13.subtract(weight, opset13.convert(constant(np.full((8, 1), 3, np.uint8)), "f32"))
    weight = opset13.multiply(weight, opset13.convert(opset13.constant(np.ones((8, 1), np.float16)), "f32"))
    given = opset13.parameter([-1, 16], np.float32)
    write_graph(Model([opset13.matmul(given, weight, False, True)], [given], "coded"), tmp_path / GRAPH)
    module = ExportedModule(tmp_path)
    ((values, bits),) = dense_weights(module)
    nothing = 3 * zero
    assert (values.numel(), bits, int(values.count_nonzero())) == (128, int(kind[1:]), int((codes != nothing).sum()))
    assert bytes_in_memory(module) == 128 * bits // 8 + 16 + zero * 8 * bits // 8
    assert torch.allclose(module(torch.eye(16)), (torch.from_numpy(codes).float() - 3 * zero).t())
