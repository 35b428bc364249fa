"""What llmq makes is served by those who serve: transformers' own server, asked by OpenAI's client."""

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

import llmq

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")
ASKED = [{"role": "user", "content": "the cat"}]


@pytest.fixture(scope="module")
def run(tiny_llama, tiny_jsonl, tmp_path_factory):
    recipe = {
        "model": {"causal_lm": {"weights": str(tiny_llama)}},
        "steps": [
            "quantize.bnb",
            {"adapt.lora": {"data": str(tiny_jsonl), "max_steps": 1, "max_length": 32}},
            {"adapt.merge": {"data": str(tiny_jsonl), "tokens": 64, "window": 32}},
        ],
        "evaluate": ["size"],
    }
    return llmq.run(recipe, out=tmp_path_factory.mktemp("served") / "run").folder


@pytest.fixture
def server(run, stage) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("transformers"), "serve", run / stage, "--port", str(port)]
    process = subprocess.Popen([*map(str, command), "--device", "cpu"])
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            assert process.poll() is None, "the server ended by itself"
            try:
                urllib.request.urlopen(f"{address}/health", timeout=1)
                break
            except OSError:
                time.sleep(0.5)
        yield address
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.loopback
@pytest.mark.parametrize("stage", ["1-quantize.bnb", "3-adapt.merge"])
def test_transformers_serves_a_stage_and_says_what_llmq_says(run, stage, server):
    client = openai.OpenAI(base_url=f"{server}/v1", api_key="none")
    answer = client.chat.completions.create(model=str(run / stage), messages=ASKED, max_tokens=8, temperature=0)
    with llmq.open(run / stage) as loaded:
        asked = loaded.processor.apply_chat_template(
            ASKED, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        told = loaded.module.generate(**asked, max_new_tokens=8, do_sample=False)[0, asked.input_ids.shape[1] :]
        expected = loaded.processor.decode(told, skip_special_tokens=True)
    assert answer.choices[0].message.content == expected
