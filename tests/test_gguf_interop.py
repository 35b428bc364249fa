"""GGUF across houses: what llmq writes llama.cpp opens, and answers and scores a text as torch does.

Those marked slow need `LLMQ_LLAMACPP_PYTHON`, a Python interpreter that has xllamacpp.
"""

import json
import math
import os
import subprocess
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import tiny_text_models
import torch
from helpers import apply, base_of, some_ids
from test_gguf import ROPE, SPECIAL

from llmq.artifact import Artifact
from llmq.text.gguf.layout import ARCHITECTURES
from llmq.text.weights import BUILT_IN, built_in

PYTHON = os.environ.get("LLMQ_LLAMACPP_PYTHON", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="LLMQ_LLAMACPP_PYTHON names no Python interpreter that has xllamacpp"),
    pytest.mark.usefixtures("one_thread"),
]
OTHER = """
import json, sys
import xllamacpp

jobs, told = json.load(open(sys.argv[1])), {}
for name, (file, prompts, most) in jobs.items():
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.n_gpu_layers = file, 512, 1, 0
    # One thread: two wait for each other by spinning, and beside other work that takes minutes instead of seconds.
    params.warmup, params.fit_params, params.verbosity, params.cpuparams.n_threads = False, False, -1, 1
    server = xllamacpp.Server(params)
    told[name] = []
    for ids in prompts:
        asked = {"prompt": ids, "n_predict": 1, "temperature": 0, "n_probs": most, "cache_prompt": True}
        made = server.handle_completions(asked)["choices"][0].get("logprobs")
        # None of a token that is a part of a character alone
        told[name].append(made and [[d["id"], d["logprob"]] for d in made["content"][0]["top_logprobs"]])
json.dump(told, open(sys.argv[2], "w"))
"""
LONGEST = 60
"""Seconds that the other interpreter may take."""
Prompts = list[list[int]]


def elsewhere(folder: Path, jobs: dict[str, tuple[str, Prompts, int]]) -> dict[str, list[dict[int, float] | None]]:
    """The log-probabilities of the next token by llama.cpp, after each prompt to each file."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [PYTHON, "-c", OTHER, "jobs.json", "told.json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=LONGEST)
    assert done.returncode == 0, done.stderr[-4000:]
    told = json.loads((folder / "told.json").read_text())
    return {name: [top and {int(i): p for i, p in top} for top in tops] for name, tops in told.items()}


def prefixes(ids: list[int], first: int) -> Prompts:
    """The beginnings of a text, from `first` tokens on."""
    return [ids[:end] for end in range(first, len(ids))]


@torch.inference_mode()
def greedy(module: Any, ids: list[int], count: int) -> list[int]:
    """The ids and `count` likeliest tokens after them."""
    for _ in range(count):
        ids = [*ids, int(module(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
    return ids


@torch.inference_mode()
def log_probabilities(module: Any, ids: list[int]) -> torch.Tensor:
    """Of each next token `(tokens, vocabulary)`."""
    return module(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)


def test_llama_cpp_answers_alike_for_every_architecture(tiny_llama, tmp_path):
    said = {
        **SPECIAL,
        "gemma3_text": {**SPECIAL["gemma3_text"], "num_hidden_layers": 6},  # one layer that sees all tokens
        # llama.cpp takes the long factors where its context is longer than the model was trained for.
        "phi3": {
            "max_position_embeddings": 2048,
            "rope_parameters": {
                **ROPE, "rope_type": "longrope", "short_factor": [1.0 + i / 4 for i in range(8)],
                "long_factor": [2.0] * 8, "original_max_position_embeddings": 512,
            },
            "original_max_position_embeddings": 512,
        },
    }  # fmt: skip
    jobs, ours = {}, {}
    for number, name in enumerate(ARCHITECTURES):
        # A name like phi-3 makes llama.cpp look for Phi-3's own special tokens.
        model = tiny_text_models.build(name, tmp_path / f"m{number}", tiny_llama, **said.get(name, {}))
        stage = apply("export.gguf", base_of(model, "float32"), tmp_path / f"m{number}-gguf")
        with stage.open("cpu") as loaded:
            ids = greedy(loaded.module, some_ids(1, 20)[0].tolist(), 8)
            ours[name] = log_probabilities(loaded.module, ids)
        jobs[name] = str(stage.weights / "model.gguf"), prefixes(ids, 20), 400
    for name, tops in elsewhere(tmp_path, jobs).items():
        known = [(ours[name][19 + i], top) for i, top in enumerate(tops) if top]
        assert len(known) >= 2, name
        apart = max(abs(p - float(exact[i])) for exact, top in known for i, p in top.items())
        print(f"{name}: log-probabilities apart by {apart:.4f} at most")
        assert apart < 0.03, name  # llama.cpp multiplies by F16


TOPIC, TOKENS = "compound", 480
NEAR = 0.2
"""The log-probabilities by which the likeliest token may lead where both engines need not choose the same."""


@pytest.mark.parametrize("sym", [True, False])
def test_llama_cpp_answers_and_scores_a_real_model_alike(sym, tmp_path):
    built_in(next(iter(BUILT_IN)))
    base = base_of(Path("smollm2-135m"))
    packed = apply("quantize.gptq", base, tmp_path / "packed", sym=sym, samples=4, length=256)
    # llama.cpp rounds the inputs of Q4_0 and Q4_1 layers to 8 bits; the same weights as F16 show the file to be right.
    compare(apply("export.gguf", packed, tmp_path / "f16", type="f16"), tmp_path, 0.005, near=0)
    compare(apply("export.gguf", packed, tmp_path / "auto"), tmp_path, 0.01, near=NEAR)


def compare(stage: Artifact, folder: Path, share: float, near: float) -> None:
    """Assert that 32 greedy tokens are the same in both engines, but for `near` ones, and the perplexity by a share."""
    exact = Artifact(stage.model.model_copy(update={"dtype": "float32"}), stage.weights, runtime="gguf")
    with exact.open("cpu") as loaded:
        ids = loaded.processor(topics[TOPIC]).input_ids[:TOKENS]
        answered = greedy(loaded.module, loaded.processor("The capital of France is").input_ids, 32)
        ours, of_answer = (log_probabilities(loaded.module, each) for each in (ids, answered))
    begun, file = len(answered) - 32, str(stage.weights / "model.gguf")
    most = 512  # a token that is less likely than so many others is left out of both means
    told = elsewhere(folder, {"answer": (file, prefixes(answered, begun), 1), "text": (file, prefixes(ids, 1), most)})
    for place, top in enumerate(told["answer"], begun):
        theirs = max(top, key=top.get) if top else answered[place]
        assert of_answer[place - 1, answered[place]] - of_answer[place - 1, theirs] <= near
    known = [(n, top) for n, top in enumerate(told["text"]) if top and ids[n + 1] in top]
    mine = math.exp(-sum(float(ours[n, ids[n + 1]]) for n, _ in known) / len(known))
    theirs = math.exp(-sum(top[ids[n + 1]] for n, top in known) / len(known))
    print(f"{stage.weights.name}: perplexity {mine:.4f} in torch, {theirs:.4f} in llama.cpp, {len(known)} tokens")
    assert len(known) > 400
    assert theirs == pytest.approx(mine, rel=share)
