"""Sizes, memory and time are foretold from configuration alone; sizes are those that the steps then write."""

import json
import shutil
from collections import defaultdict
from dataclasses import replace
from math import isclose
from pathlib import Path
from typing import Any

import pytest
import torch
from run_folders import size, write_run
from typer.testing import CliRunner

import llmq
from llmq import api, cli, environment, pipeline, planning, plugin, recipe
from llmq.artifact import Artifact
from llmq.cli.planning import as_text
from llmq.errors import UserError
from llmq.planning import rates
from llmq.report import Report, foretold
from llmq.sketch import Part, Work, of_file
from llmq.text.sizing import packing, trials
from llmq.text.sizing.network import sketch_of
from llmq.text.sizing.work import rounding, saved
from llmq.types import Context

MEASURE = rates.measure  # as it is outside of tests
HERE = Context("cpu", 0)


def job_of(model: Any, *steps: Any, tasks: Any = ("size",), **more: Any) -> recipe.Recipe:
    plain = {"model": model, "steps": list(steps), "evaluate": list(tasks), **more}
    return api.load(plain, checked=False)


def configuration_alone(model: Path, folder: Path) -> Path:
    folder.mkdir()
    shutil.copy(model / "config.json", folder)
    return folder


STEPS = [
    [{"quantize.rtn": {"bits": 4, "group_size": 32}}],
    [{"quantize.rtn": {"bits": 3, "group_size": -1}}],
    [{"quantize.rtn": {"bits": 8, "group_size": 32, "modules": {"down_proj": "skip", "lm_head": {"bits": 4}}}}],
    [{"quantize.bnb": {}}],
    [{"quantize.bnb": {"double_quant": False, "skip_modules": ["v_proj"]}}],
    [{"quantize.bnb": {"bits": 8}}],
    [{"prune.magnitude": {"sparsity": 0.5}}],
    [{"prune.layers": {"drop": 1, "samples": 2, "length": 16}}],
    [{"quantize.bnb": {}}, {"adapt.lora": {"r": 4, "max_steps": 1, "max_length": 32}}],
    [{"adapt.lora": {"r": 4, "use_dora": True, "target_modules": ["q_proj"], "max_steps": 1}}, "adapt.merge"],
    [
        {"quantize.rtn": {"bits": 4, "group_size": 32, "sym": False}},
        {"adapt.lora": {"r": 4, "max_steps": 1, "max_length": 32, "use_qalora": True}},
        "adapt.merge",
    ],
    [{"adapt.full": {"max_steps": 1, "max_length": 32, "teacher": "base"}}],
    [{"quantize.rtn": {"group_size": 32}}, "export.compressed_tensors"],
]


@pytest.mark.parametrize(
    ("dtype", "steps"),
    [*(("bfloat16", steps) for steps in STEPS), *(("float32", steps) for steps in STEPS[:4])],
    ids=lambda value: value if isinstance(value, str) else "-".join(next(iter(plugin_of(step))) for step in value),
)
def test_sizes_are_those_that_the_steps_write(steps, dtype, tiny_llama, tiny_jsonl, tmp_path):
    steps = json.loads(json.dumps(steps))
    for word, settings in (item for step in steps if isinstance(step, dict) for item in step.items()):
        if word in ("adapt.lora", "adapt.full", "prune.layers"):
            settings["data"] = "pydoc" if word == "prune.layers" else {"file": {"path": str(tiny_jsonl)}}
    bare = configuration_alone(tiny_llama, tmp_path / "bare")
    foretold = job_of({"causal_lm": {"weights": str(bare), "dtype": dtype}}, *steps)
    sketch, artifact = (
        foretold.model.sketch(),
        foretold.model.model_copy(update={"weights": str(tiny_llama)}).base(HERE),
    )
    for number, step in enumerate(foretold.steps):
        made, _ = step.foresee(sketch)
        folder = tmp_path / str(number)
        folder.mkdir()
        artifact = step.apply(artifact, folder, HERE)
        sketch = made
    found = sizes_of(artifact)
    assert isclose(sketch.on_disk, found["bytes_on_disk"], rel_tol=0.005), (sketch.on_disk, found)
    assert sketch.parameters == found["parameters"]
    assert isclose(sketch.in_memory, found["bytes_in_memory"], rel_tol=0.01), (sketch.in_memory, found)


def plugin_of(step: Any) -> dict[str, Any]:
    return step if isinstance(step, dict) else {step: {}}


def sizes_of(artifact: Artifact) -> dict[str, float]:
    with artifact.open("cpu") as loaded:
        size: Any = plugin.build("size", "tasks")
        return {m.metric: m.value for m in size.score(loaded)}


@pytest.mark.parametrize(
    ("model", "steps"),
    [
        ({"edsr": {"scale": 2, "n_resblocks": 2, "n_feats": 16}}, []),
        ({"timm_classifier": {"architecture": "resnet10t", "model_args": {"channels": [8, 16, 16, 32]}, "classes": 10,
                              "channels": 1, "input_size": 32}}, [{"prune.channels": {"ratio": 0.5}}]),
    ],
)  # fmt: skip
def test_image_models_are_cut_as_they_will_be(model, steps, tmp_path):
    job = job_of(model, *steps)
    sketch, artifact = job.model.sketch(), job.model.base(HERE)
    for step in job.steps:
        sketch, _ = step.foresee(sketch)
        artifact = step.apply(artifact, tmp_path, HERE)
    found = sizes_of(artifact)
    assert isclose(sketch.on_disk, found["bytes_on_disk"], rel_tol=0.02)
    assert sketch.parameters == found["parameters"]


def test_the_header_of_a_file_is_counted_to_the_byte(tmp_path):
    from safetensors.torch import save_file

    shapes = {"a.weight": (3, 5), "b": (7,), "a_long_name.of_a.tensor": (2, 2, 2)}
    save_file({n: torch.zeros(s, dtype=torch.bfloat16) for n, s in shapes.items()}, tmp_path / "f", {"format": "pt"})
    parts = [Part.plain(name, shape, "bfloat16") for name, shape in shapes.items()]
    assert of_file(parts) == (tmp_path / "f").stat().st_size


def test_nothing_but_a_configuration_is_needed(tiny_llama, tmp_path):
    folder = configuration_alone(tiny_llama, tmp_path / "bare")
    job = job_of(
        {"causal_lm": {"weights": str(folder)}},
        {"quantize.gptq": {"samples": 4, "length": 32, "group_size": 32}},
        {"adapt.lora": {"data": "no_such_file.jsonl", "max_steps": 3}},
        tasks=[
            "size",
            {"perplexity": {"limit": 8}},
            {"lm_eval": {"tasks": ["pydoc_continuation"], "limit": 4}},
            "speed",
        ],
    )
    made = planning.plan(job)
    assert [stage.name for stage in made.stages] == job.stage_names
    assert made.seconds
    assert all(stage.bytes_on_disk and stage.peak_of_tasks for stage in made.stages)
    assert not made.misfits


@pytest.mark.parametrize(
    ("name", "billions"),
    [("meta-llama/Llama-3.2-1B", 1.24), ("meta-llama/Llama-3.1-8B", 8.03), ("meta-llama/Llama-3.1-70B", 70.6)],
)
def test_models_of_the_hub_are_foretold_from_configurations_kept_here(name, billions):
    assert sketch_of(name, "bfloat16").parameters / 1e9 == pytest.approx(billions, rel=0.005)


@pytest.mark.parametrize("word", ["quantize.gptq", "quantize.awq", "prune.wanda", "prune.sparsegpt", "prune.alps"])
def test_gradients_of_the_loss_are_foretold_as_more_work_and_the_same_files(word):
    sketch = sketch_of("meta-llama/Llama-3.2-1B", "bfloat16")
    plain, weighed = (plugin.build({word: {"hessian": h}}).foresee(sketch) for h in ("inputs", "loss"))
    assert plain[0] == weighed[0]
    assert sum(plain[1].operations.values()) < sum(weighed[1].operations.values())


@pytest.mark.parametrize(("pools", "bits"), [(True, 5), (False, 16)])
def test_a_grid_that_a_merge_leaves_is_foretold_as_carried_into_gguf(pools, bits, tiny_llama):
    sketch = job_of({"causal_lm": {"weights": str(tiny_llama)}}).model.sketch()
    lora = {"adapt.lora": {"data": "pydoc", "r": 4, "max_steps": 1, "use_qalora": pools}}
    for step in ({"quantize.rtn": {"bits": 4, "group_size": 32, "sym": False}}, lora, "adapt.merge", "export.gguf"):
        sketch, _ = plugin.build(step).foresee(sketch)
    assert {p.stored[0].bytes * 8 / p.weights for p in sketch.parts if p.role == "linear"} == {bits}


@pytest.mark.parametrize("word", ["adapt.lora", "adapt.full"])
def test_a_teacher_is_foretold_as_a_second_model_that_answers_every_batch(word, tiny_llama):
    untouched = job_of({"causal_lm": {"weights": str(tiny_llama)}}).model.sketch()
    pruned, _ = plugin.build({"prune.layers": {"drop": 1, "samples": 2, "length": 16}}).foresee(untouched)
    settings = {"data": "pydoc", "max_steps": 10, "max_length": 32}
    plain, taught = (plugin.build({word: {**settings, **more}}).foresee(pruned) for more in ({}, {"teacher": "base"}))
    assert plain[0] == taught[0]
    assert taught[1].memory >= plain[1].memory + untouched.in_memory
    assert 1.2 * sum(plain[1].operations.values()) < sum(taught[1].operations.values())


def test_a_model_that_nobody_knows_is_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match="no built-in word"):
        sketch_of("nothing", "bfloat16")
    with pytest.raises(UserError, match="the hub does not give it"):
        sketch_of("owner/name", "bfloat16")
    with pytest.raises(UserError, match="is no folder whose"):
        job_of({"timm_classifier": {"weights": "owner/name"}}).model.sketch()


def test_what_does_not_fit_names_the_nearest_setting_that_does(tiny_llama, tmp_path, monkeypatch):
    folder = configuration_alone(tiny_llama, tmp_path / "bare")
    lora = {"adapt.lora": {"data": "pydoc", "max_steps": 3, "per_device_train_batch_size": 8, "max_length": 512}}
    job = job_of({"causal_lm": {"weights": str(folder)}}, lora)
    needed = [d.peak_of_step or 0 for d in planning.plan(job).stages][1] + planning.LIBRARIES
    halved = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    assert next(job.steps[0].smaller()) == halved
    monkeypatch.setattr(environment, "free_memory", lambda device: needed - 1)
    (misfit,) = planning.plan(job).misfits
    assert "adapt.lora.per_device_train_batch_size=4 adapt.lora.gradient_accumulation_steps=2" in misfit.cure
    monkeypatch.setattr(environment, "free_memory", lambda device: planning.LIBRARIES // 2)
    assert "no setting of it fits" in planning.plan(job).misfits[0].cure


def test_libraries_take_no_memory_of_a_card(tiny_llama, tmp_path, monkeypatch):
    job = job_of({"causal_lm": {"weights": str(configuration_alone(tiny_llama, tmp_path / "bare"))}}, "quantize.bnb")
    here = planning.plan(job, rates=defaultdict(lambda: 1.0))
    assert f"{planning.LIBRARIES / 1e9:.1f} GB are libraries" in as_text(here)
    monkeypatch.setattr(environment, "prepare", lambda *_: "cuda:0")
    monkeypatch.setattr(environment, "free_memory", lambda device: here.peak_memory)
    there = planning.plan(job, rates=defaultdict(lambda: 1.0))
    assert not there.misfits
    assert f"memory   about {planning.in_bytes(there.peak_memory)}, on the card;" in as_text(there)


def test_a_grid_that_a_layer_forbids_is_refused_by_a_plan_too(tiny_llama):
    job = job_of({"causal_lm": {"weights": str(tiny_llama)}}, {"quantize.rtn": {"group_size": 128}})
    with pytest.raises(UserError, match="is not divisible by 128; 64 and 32 are"):
        planning.plan(job)


def test_a_resumed_run_needs_no_disk_for_the_stages_that_it_has(tiny_llama, tmp_path):
    job = job_of({"causal_lm": {"weights": str(tiny_llama)}}, {"prune.magnitude": {"sparsity": 0.5}}, "quantize.bnb")
    (tmp_path / "1-prune.magnitude").mkdir()
    whole, left = (planning.plan(job, out, defaultdict(lambda: 1.0)) for out in (None, tmp_path))
    assert whole.disk - left.disk == left.stages[1].bytes_on_disk


def test_a_plan_reads_on_a_terminal_and_as_data(tiny_llama, tmp_path, monkeypatch):
    folder = configuration_alone(tiny_llama, tmp_path / "bare")
    file = tmp_path / "job.yaml"
    file.write_text(
        f"model: {{causal_lm: {{weights: {folder}}}}}\nsteps: [quantize.bnb]\nevaluate: [size, perplexity]\n"
    )
    shown = CliRunner().invoke(cli.app, ["plan", str(file)])
    assert shown.exit_code == 0, shown.output
    assert "1-quantize.bnb" in shown.output
    data = json.loads(CliRunner().invoke(cli.app, ["plan", str(file), "--json"]).output)
    assert data["stages"][1]["bytes_on_disk"] < data["stages"][0]["bytes_on_disk"]
    monkeypatch.setattr(environment, "free_memory", lambda device: 1)
    refused = CliRunner().invoke(cli.app, ["plan", str(file)])
    assert refused.exit_code == 2
    assert "WILL NOT FIT" in refused.output
    assert json.loads(json.dumps(llmq.plan(str(file)).plain()))["stages"] == data["stages"]


def test_what_is_not_known_is_said_to_be_unknown():
    made = planning.plan(recipe.load("vision/exported-int8", checked=False))
    assert (made.peak_memory, made.disk, made.seconds) == (None, None, None)
    assert made.line().startswith("foretold: nothing; there is no file 'digits/model.onnx'")
    assert [line.split()[1] for line in as_text(made).splitlines() if line[:4] in ("time", "memo", "disk")] == [
        "unknown", "unknown;", "unknown;"
    ]  # fmt: skip


def test_work_of_several_parts_adds_time_and_takes_the_highest_memory():
    both = Work(3, {"copy": 2.0}, 1.0).plus(Work(5, {"copy": 1.0, "float32": 4.0}, 0.5, unknown="why"))
    assert (both.memory, both.operations, both.seconds, both.unknown) == (5, {"copy": 3.0, "float32": 4.0}, 1.5, "why")
    assert rates.seconds_of(both, {"copy": 1.0}) is None
    known = replace(both, unknown="")
    assert rates.seconds_of(known, {"copy": 1.0, "float32": 2.0, "python": rates.PYTHON / 2}) == 3 + 2 + 2 * 1.5


def test_a_block_and_a_head_are_tried_at_their_own_widths():
    sketch = sketch_of("smollm2-135m", "bfloat16")
    forwards, backwards = (trials.block(sketch, 1, 64, learns) for learns in (False, True))
    assert str(forwards) == "block bfloat16 1x64x576"
    assert str(backwards) == f"{forwards} and backwards"
    weights = sum(part.weights for part in sketch.linears) / len(sketch.blocks)
    run, operations = forwards.unit("cpu")
    assert operations == 2 * 64 * (weights + 64 * sketch.queries)  # each token sees half of the others, twice
    run()
    backwards.unit("cpu")[0]()
    run, operations = trials.head(sketch, 16).unit("cpu")
    assert operations == 2 * 16 * 576 * trials.HEAD_OUTPUTS
    run()


def test_a_divergence_is_tried_on_a_part_of_the_vocabulary():
    run, logits = trials.divergence(49152).unit("cpu")
    assert logits == 32 * trials.HEAD_OUTPUTS
    assert run()[0] == pytest.approx(0, abs=1e-9)  # both are uniform


def test_rounding_is_tried_on_a_part_of_the_largest_matrix():
    sketch = sketch_of("smollm2-135m", "bfloat16")
    job = rounding(sketch, [part.name for part in sketch.linears])
    ((trial, count),) = job.operations.items()
    assert (str(trial), count) == ("grid 1536x576", sum(part.weights for part in sketch.linears))
    run, weights = trial.unit("cpu")
    assert (len(run().codes), weights) == (576, 1536 * 576)
    assert str(trials.grid(28672, 8192)) == "grid 512x2048"


def test_layers_of_8_bits_keep_what_they_were_given_while_adapters_train():
    float_, packed = sketch_of("smollm2-135m", "bfloat16"), None
    packed, _ = plugin.build({"quantize.bnb": {"bits": 8}}).foresee(float_)
    more = saved(packed, 1, 10, 16, False) - saved(float_, 1, 10, 16, False)
    assert more == 30 * 10 * 2 * (3 * 576 + 1536)  # 30 blocks, 10 tokens, 2 bytes; q and the stream are 576 wide


@pytest.mark.parametrize("name", ["meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-70B"])
def test_a_trial_of_a_large_model_is_small(name):
    sketch = sketch_of(name, "bfloat16")
    shape = trials._shape(sketch, 4, 2048, True)
    assert shape.hidden <= trials.WIDEST
    assert 3 * shape.operations <= 1.1 * trials.MOST
    assert sum(outputs * inputs for outputs, inputs in shape.layers.values()) < 1e8


@pytest.mark.slow
def test_a_machine_is_measured_in_two_seconds():
    found = MEASURE(["float32", "bfloat16", "float32-vector"], "cpu")
    assert set(found) == {"float32", "bfloat16", "float32-vector", "copy", "python"}
    assert all(rate > 0 for rate in found.values())


def test_durations():
    assert [planning.duration(s) for s in (None, 3.2, 600, 9000)] == ["unknown", "3 s", "10 min", "2.5 h"]


def test_nf4_of_a_matrix_is_half_a_byte_a_weight_and_its_scales():
    part = packing.nf4(Part.plain("w.weight", (1024, 1024), "bfloat16", "linear"), "nf4", True, "bfloat16")
    assert part.opened == 2**20 // 2 + 2**20 // 64 + 4 * (2**20 // 64 // 256) + 4 * (256 + 16 + 1)


GRAPHS = ("vision/classifier-int8", "vision/digits-int8-bound", "vision/digits-qat4")
"""Recipes that are foretold by an export of their network."""


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in GRAPHS else n for n in recipe.names("recipes")]
)
def test_every_bundled_recipe_is_foretold(name):
    if name == "vision/rock-drsrd1":
        pytest.skip("its data is not bundled; its steps are known when that is read")
    if name == "vision/exported-int8":
        pytest.skip("a graph that somebody exported is not foretold, and says so")
    made = planning.plan(recipe.load(name, checked=False))
    assert made.seconds, [stage.unknown for stage in made.stages]
    assert all(stage.bytes_on_disk for stage in made.stages)


def test_a_run_is_refused_with_a_cure_before_anything_is_loaded(tiny_llama, tiny_jsonl, tmp_path, monkeypatch, capsys):
    job = {
        "model": {"causal_lm": {"weights": str(tiny_llama)}},
        "steps": [{"adapt.lora": {"data": str(tiny_jsonl), "max_steps": 1, "max_length": 64}}],
        "evaluate": ["size"],
    }
    monkeypatch.setattr(environment, "free_memory", lambda device: planning.LIBRARIES)
    monkeypatch.setattr(pipeline, "bring", lambda *_: pytest.fail("the base was brought"))
    with pytest.raises(UserError, match=r"1-adapt.lora: .* no setting of it fits: .*; --force goes on"):
        api.run(job, out=tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


@pytest.mark.slow
def test_a_report_sets_what_was_foretold_beside_what_was_measured(tiny_llama, tmp_path, monkeypatch, capsys):
    job = {
        "model": {"causal_lm": {"weights": str(tiny_llama)}},
        "steps": [{"quantize.rtn": {"group_size": 32}}],
        "evaluate": ["size", {"speed": {"prompt_tokens": 8, "new_tokens": 2, "rounds": 3}}],
    }
    monkeypatch.setattr(environment, "free_memory", lambda device: planning.LIBRARIES)
    report = api.run(job, out=tmp_path / "run", force=True, cache=False)
    assert report.foretold
    told = dict(foretold.lines(report))
    assert "(1.00x)" in told["1-quantize.rtn"].split(";")[0]
    assert set(told) == {"0-base", "1-quantize.rtn", "all stages"}
    assert "Foretold and measured" in (tmp_path / "run" / "report.md").read_text()
    assert Report.read(tmp_path / "run").foretold
    assert "will not fit" in capsys.readouterr().err


def test_a_peak_is_not_judged_where_answers_were_kept_from_an_earlier_run(tmp_path):
    folder = write_run(tmp_path / "run", {"0-base": [size(10.0)]})
    stage = {"name": "0-base", "bytes_on_disk": 10_000_000, "peak_of_tasks": 500_000_000, "tasks": {}}
    report = replace(Report.read(folder), foretold={"stages": [stage], "seconds": None})
    report.stages[0].update(asked={"peak_memory": 80_000_000}, reused=[])
    assert (
        "peak of all tasks 500.0 MB, measured 80.0 MB (6.25x, beyond 1.15x)" in dict(foretold.lines(report))["0-base"]
    )
    report.stages[0]["reused"] = ["perplexity"]
    assert dict(foretold.lines(report))["0-base"] == "on disk 10.0 MB, measured 10.0 MB (1.00x)"


def test_a_run_that_cannot_be_foretold_goes_on(monkeypatch, capsys, tmp_path):
    def fails(*_: object) -> None:
        raise RuntimeError("no such network")

    monkeypatch.setattr(planning, "plan", fails)
    assert planning.before_run(job_of({"edsr": {}}), tmp_path, force=False) is None
    assert "not foretold: " in capsys.readouterr().err
