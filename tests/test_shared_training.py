"""Two processes that `torchrun` starts train as one process with twice the accumulation, and answer as one does."""

import json
import os
import subprocess
import sys

import pytest
import torch
from lm_eval_tasks import LAMBADA, metrics, write

import llmq
from llmq.report import Report
from llmq.report.facts import facts
from llmq.report.rows import rows

pytestmark = pytest.mark.slow

SCRIPT = """
import json, sys
import llmq
from torture.child import no_machine_is_measured
no_machine_is_measured()
for name, recipe in json.loads(open(sys.argv[1]).read()).items():
    try:
        llmq.run(recipe, out=f"{sys.argv[2]}/{name}", cache=False)
    except SystemExit as ended:
        print("ENDED", name, ended.code, flush=True)
"""
PORT = 29640
NAMES = ("lora", "sharded", "qlora", "full", "scales", "rtn", "images", "calibrated")


def launched(*command, port=PORT, processes=2):
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", str(port),
         *map(str, command)],
        capture_output=True, text=True, timeout=240, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), "tests"]), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def recipes(folder, data, accumulation):
    """The recipe of each training, with batches that the processes share or that one process accumulates."""
    train = {
        "data": str(data), "max_length": 64, "max_steps": 4, "per_device_train_batch_size": 2, "eval_steps": 2,
        "gradient_accumulation_steps": accumulation, "training_arguments": {"logging_steps": 1},
    }  # fmt: skip
    scales = {
        "data": str(data), "samples": 8, "length": 32, "max_steps": 4, "held_out_rows": 2, "eval_steps": 2,
        "per_device_train_batch_size": accumulation,  # it accumulates nothing
    }  # fmt: skip
    arguments = {"logging_steps": 1, **({"fsdp": "full_shard"} if accumulation == 1 else {})}  # of several processes
    steps = {
        "lora": [{"adapt.lora": {**train, "r": 4}}],
        "sharded": [{"adapt.lora": {**train, "r": 4, "training_arguments": arguments}}],
        "qlora": [
            {"quantize.bnb": {"compute_dtype": "float32"}},
            {"adapt.lora": {**train, "r": 4, "training_arguments": arguments}},
        ],
        "full": [{"adapt.full": {**train, "learning_rate": 1e-4}}],
        "scales": [{"quantize.rtn": {"bits": 2, "group_size": 32}}, {"adapt.scales": scales}],
    }
    model = {"causal_lm": {"weights": str(folder), "dtype": "float32"}}
    asked = ["size", {"perplexity": {"data": str(data), "limit": 4, "window": 32, "batch_size": 1}}]
    trained = {name: {"model": model, "steps": its, "evaluate": asked} for name, its in steps.items()}
    rounded = [{"quantize.rtn": {"bits": 4, "group_size": 32}}]
    long = data.parent / "long.jsonl"
    long.write_text("".join(json.dumps({"text": f"{i} and {i * i} are numbers."}) + "\n" for i in range(200)))
    few = {"data": str(long), "samples": 5, "length": 256}  # three batches
    calibrated = [{"prune.wanda": few}, {"quantize.gptq": {**few, "group_size": 32}}]
    questions = {"tasks": ["pydoc_continuation"], "limit": 6, "batch_size": 5}
    compared = {"divergence": {"text": str(data), "window": 32, "windows": 5, **questions}}
    written = {**LAMBADA, "output_type": "generate_until", "metric_list": metrics("exact_match")}
    sampled = {"until": ["\n"], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0}
    texts = [
        write(data.parent / "texts", "greedy", {**written, "generation_kwargs": {**sampled, "do_sample": False}}),
        write(data.parent / "texts", "sampled", {**written, "generation_kwargs": sampled}),
    ]
    asking = {
        "lm_eval": {**questions, "tasks": [*questions["tasks"], *texts], "include_path": str(data.parent / "texts")}
    }
    slices = {"rock": {"scale": 2, "train_slices": 1, "held_out_slices": 3, "size": 48}}
    upscaling = ["super_resolution", "rock", "no_reference", "fidelity"]
    return {
        **trained,
        "rtn": {"model": model, "steps": rounded, "evaluate": [*asked, compared, asking]},
        "calibrated": {"model": model, "steps": calibrated, "evaluate": asked},
        "images": {
            "model": {"srcnn": {"scale": 2}},
            "steps": [{"prune.magnitude": {"sparsity": 0.3}}],
            "evaluate": [{word: {"data": slices}} for word in upscaling],
        },
    }


@pytest.fixture(scope="module")
def runs(tiny_llama, tiny_jsonl, tmp_path_factory):
    """Each recipe as run by two processes, and by one."""
    place = tmp_path_factory.mktemp("shared")
    (place / "script.py").write_text(SCRIPT)
    (place / "recipes.json").write_text(json.dumps(recipes(tiny_llama, tiny_jsonl, 1)))
    made = launched(place / "script.py", place / "recipes.json", place / "two")
    assert made.returncode == 0, made.stdout + made.stderr
    assert made.stdout.count("ENDED") == len(NAMES), made.stdout  # the second process ends without a report, each time
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name, recipe in recipes(tiny_llama, tiny_jsonl, 2).items():
        llmq.run(recipe, out=place / "one" / name, cache=False)
    torch.set_num_threads(threads)
    return {name: [Report.read(place / of / name) for of in ("two", "one")] for name in NAMES}


@pytest.mark.parametrize("name", NAMES[:-3])
def test_two_processes_learn_what_one_does_with_twice_the_accumulation(runs, name):
    two, one = (report.stages[-1]["notes"]["training"] for report in runs[name])
    assert (two["processes"], one["processes"]) == (2, 1)
    assert two["tokens"] == one["tokens"]
    for curve in ("loss", "held_out_loss"):
        assert [step for step, _ in two[curve]] == [step for step, _ in one[curve]]
        wanted = [value for _, value in one[curve]]
        assert [value for _, value in two[curve]] == pytest.approx(wanted, rel=1e-4, abs=1e-4)  # told to 4 digits
    figures = [
        {(m["stage"], m["metric"]): m["value"] for m in report.measurements if m["task"] == "perplexity"}
        for report in runs[name]
    ]
    assert figures[0] == pytest.approx(figures[1], rel=1e-4)
    assert figures[0]


@pytest.mark.parametrize(
    ("name", "tasks"),
    [
        ("rtn", {"size", "perplexity", "divergence", "pydoc_continuation", "greedy", "sampled"}),
        ("images", {"super_resolution", "rock", "no_reference", "fidelity"}),
    ],
)
def test_two_processes_answer_to_the_bit_what_one_does(runs, name, tasks):
    """Of each forward pass one process computes all, and each reports what it was asked, in the order of one."""
    two, one = runs[name]
    assert two.measurements == one.measurements  # with the scores of every sample
    assert [dict(e) for e in two.exhibits] == [dict(e) for e in one.exhibits]
    assert {m["task"] for m in two.measurements} == tasks
    assert not two.failures
    assert [s["asked"]["processes"] for s in two.stages] == [2, 2]
    assert [s["asked"]["processes"] for s in one.stages] == [1, 1]
    told = dict(facts(two, rows(two))["Stages"])
    assert all(text.endswith("answered by 2 processes") for text in told.values()), told


def test_two_processes_calibrate_to_the_bytes_of_one(runs):
    two, one = runs["calibrated"]
    assert two.measurements == one.measurements
    assert [stage["notes"].get("processes") for stage in two.stages] == [None, 2, 2]
    for stage in (1, 2):
        folders = [next(report.folder.glob(f"{stage}-*")) for report in (two, one)]
        names = ["artifact.json", "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"]
        files = [[(folder / name).read_bytes() for name in names] for folder in folders]
        assert files[0] == files[1]


@pytest.mark.parametrize(("name", "least", "most"), [("lora", 1, 1), ("sharded", 0.5, 0.51), ("qlora", 0.5, 0.51)])
def test_fsdp_really_shares_weights_out_over_processors(runs, name, least, most):
    """All weights, those of 4 bits as well; the argument turns nothing of the fast path off."""
    notes = runs[name][0].stages[-1]["notes"]["training"]
    assert least <= notes.get("share_of_weights_held", 1) <= most
    assert notes["fast_path"] == "used"
