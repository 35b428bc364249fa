"""Native libraries work in a process of their own: it is kept, it may die, and it answers in one line."""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llmq import plugin
from llmq.errors import LlmqError, UserError
from llmq.openvino_runtime import GRAPH, openvino, write_graph
from llmq.types import Context
from llmq.vision import apart
from llmq.vision.exported import ExportedModule
from llmq.vision.exporting import export
from llmq.vision.graph_layers import unfed_layers
from tests.exported_families import Heads, TwoHeads, base

CPU = Context("cpu", 0)
X = torch.zeros(1, 3, 16, 16)


@pytest.fixture(scope="module")
def graph() -> Any:
    """A graph in memory."""
    return openvino().convert_model(TwoHeads(4).eval(), example_input=X)


def dying_python(folder: Path, job: str) -> str:
    """A Python that ends at a job as a native library ends that reads where nothing is, and does the others."""
    script = folder / "python"
    script.write_text(
        f'#!/bin/sh\nwhile read -r line; do\ncase $line in *\\"{job}\\"*) kill -SEGV $$;; esac\necho done\ndone\n'
    )
    script.chmod(0o755)
    return str(script)


@pytest.fixture
def nobody_waits(monkeypatch):
    """The next job starts a process."""
    monkeypatch.setattr(apart, "_waiting", [])


def test_one_process_does_job_after_job_and_another_takes_over_from_a_dead_one(
    graph, nobody_waits, tmp_path, monkeypatch
):
    monkeypatch.setattr(sys, "executable", dying_python(tmp_path, "none"))
    apart.check_runs(graph, Heads().title, [X])
    (first,) = apart._waiting
    apart.check_runs(graph, Heads().title, [X])
    assert apart._waiting == [first]
    os.kill(first.process.pid, signal.SIGSEGV)
    with pytest.raises(
        LlmqError, match=r"^the exported graph of tests\.\S+ ended OpenVINO \S+ by SIGSEGV, a fault of "
    ):
        apart.check_runs(graph, Heads().title, [X])
    assert not apart._waiting
    apart.check_runs(graph, Heads().title, [X])
    (second,) = apart._waiting
    assert second.process.pid != first.process.pid
    os.kill(second.process.pid, signal.SIGALRM)  # as after a while without a job: nothing was lost
    apart.check_runs(graph, Heads().title, [X])
    (third,) = apart._waiting
    third.process.kill()
    assert third.end()[0] == -signal.SIGKILL


@pytest.mark.parametrize("word", ["quantize.int8", "quantize.dynamic"])
def test_a_library_that_dies_is_one_line_with_model_step_and_cure(word, tmp_path, nobody_waits, monkeypatch):
    monkeypatch.setattr(sys, "executable", dying_python(tmp_path, "change"))
    gan = plugin.build({"models.dcgan": {"features": 4, "latent_size": 8}})
    artifact = gan.base(CPU)
    (tmp_path / "stage").mkdir()
    with pytest.raises(LlmqError, match=rf"^{word} of models\.dcgan ended OpenVINO \S+ by SIGSEGV.* or take ") as error:
        plugin.build({word: {}}).apply(artifact, tmp_path / "stage", CPU)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "stage").iterdir())


@pytest.mark.parametrize("word", ["quantize.float16", "quantize.dynamic"])
def test_a_graph_that_ends_who_runs_it_is_run_elsewhere_first(word, tmp_path, nobody_waits, monkeypatch):
    monkeypatch.setattr(sys, "executable", dying_python(tmp_path, "run"))
    (tmp_path / "stage").mkdir()
    with pytest.raises(LlmqError, match=r"^the exported graph of .* ended OpenVINO .* by SIGSEGV"):
        plugin.build({word: {}}).apply(base(tmp_path / "base"), tmp_path / "stage", CPU)
    assert not list((tmp_path / "stage").iterdir())


def test_a_graph_that_ends_who_opens_it_is_opened_elsewhere_first(tmp_path, nobody_waits, monkeypatch):
    (tmp_path / "graph").mkdir()
    write_graph(export(TwoHeads(7).eval(), Heads()), tmp_path / "graph" / GRAPH)
    monkeypatch.setattr(apart, "_waiting", [])
    monkeypatch.setattr(sys, "executable", dying_python(tmp_path, "run"))
    artifact = base(tmp_path / "base").then(plugin.build("quantize.float16"), weights=tmp_path / "graph")
    with pytest.raises(LlmqError, match=r"^opening the exported .* ended OpenVINO .* by SIGSEGV"):
        artifact.model.open(replace(artifact, runtime="openvino"), "cpu")


def test_a_python_that_does_not_begin_says_why(graph, tmp_path, nobody_waits, monkeypatch):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho no module named so >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(LlmqError, match=r"^the exported graph of .* failed: no module named so; "):
        apart.check_runs(graph, Heads().title, [X])


@pytest.mark.slow
def test_what_the_user_got_wrong_stays_the_users_and_what_a_library_says_is_one_line(graph, tmp_path):
    step = plugin.build({"quantize.int8": {"ignored": ["trnk"]}})
    with pytest.raises(UserError, match="ignored: the network has no layer 'trnk'; did you mean 'trunk"):
        apart.changed(step, Heads().title, graph, [X])
    (tmp_path / "model.xml").write_text("no graph")
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(LlmqError, match=r"^opening the exported tests\.\S+ failed: .*; keep layers in float") as error:
        apart.check_opens(tmp_path, Heads().title, X)
    assert "\n" not in str(error.value)
    assert not isinstance(error.value, UserError)


class Queries(nn.Module):
    """Learned queries, one set for each image of the batch, are projected before they see the image; as in a DETR."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
        self.early, self.late, self.pixels = nn.Linear(64, 64), nn.Linear(16, 64), nn.Conv2d(3, 64, 4, stride=4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        queries = self.early(self.queries.expand(x.shape[0], 64, 64))
        return self.late(queries @ self.pixels(x).flatten(2))


class Queried(Heads):
    """Its family, of images of one size."""

    any_size = False


def test_layers_that_the_input_does_not_reach_stay_in_float_and_the_rest_is_right():
    # With int8 weights OpenVINO 2026.4.1 does not compile it: Check 'm_element_type.is_static()' failed.
    torch.manual_seed(0)
    network, model = Queries().eval(), Queried()
    graph = export(network, model)
    (unfed,) = unfed_layers(graph)
    assert unfed.startswith("__module.early/")
    x = model.example(2)
    step = plugin.build({"quantize.dynamic": {"compute_dtype": "float32"}})
    changed = apart.changed(step, model.title, graph, [x])
    types = [o.get_element_type().get_type_name() for o in changed.get_ops() if o.get_type_name() == "Constant"]
    assert types.count("i8") == 2  # late and pixels
    with torch.inference_mode():
        truth = network(x)
    found = ExportedModule(changed)(x)
    assert 0 < float((found - truth).norm() / truth.norm()) < 0.02
