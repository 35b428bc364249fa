"""One recipe in two folders: every file of every stage has the same bytes, wherever and however it was run."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from helpers import logits_of, some_ids

from llmq.artifact import MACHINE, Artifact
from llmq.errors import UserError
from llmq.files import sha256
from llmq.targets import stages_of

RECIPES = {
    "text": """
model: {causal_lm: {weights: model}}
steps:
- quantize.bnb: {bits: 4, double_quant: true}
- adapt.lora: {data: rows.jsonl, r: 4, max_steps: 2, max_length: 64, per_device_train_batch_size: 2}
- adapt.merge: {}
- quantize.gptq: {bits: 4, group_size: 32, data: rows.jsonl, length: 64, samples: 4}
evaluate: [size, perplexity: {data: rows.jsonl, part: all, limit: 2, window: 64}]
""",
    "adapter": """
model: {causal_lm: {weights: model}}
steps:
- adapt.lora: {data: rows.jsonl, r: 4, max_steps: 1, max_length: 64, per_device_train_batch_size: 2}
evaluate: [size]
""",
    "vision": """
model: {edsr: {n_resblocks: 2, n_feats: 32}}
steps:
- adapt.train: {data: {rock: {size: 64, train_slices: 2, held_out_slices: 1}}, max_steps: 2}
- prune.channels: {ratio: 0.25, scope: inner, round_to: 2}
- quantize.int8: {data: {rock: {size: 64, train_slices: 2, held_out_slices: 1}}, samples: 2}
evaluate: [size]
""",
}
CODE = """
import sys
from pathlib import Path
from llmq import pipeline, recipe
for name in sys.argv[1:]:
    pipeline.run(recipe.load(f"{name}.yaml"), Path("runs") / name)
"""


def run_in(folder: Path, model: Path, rows: Path, environment: dict[str, str]) -> Path:
    """Both recipes, run in a folder by a process of its own in exactly this environment."""
    folder.mkdir(parents=True)
    shutil.copytree(model, folder / "model")
    shutil.copyfile(rows, folder / "rows.jsonl")
    for name, text in RECIPES.items():
        (folder / f"{name}.yaml").write_text(text)
    command = [sys.executable, "-c", CODE, *RECIPES]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "runs"


def bytes_of_stages(runs: Path) -> dict[str, str]:
    """The hash of every file of every stage; which answers were kept from before is no part of what was measured."""
    hashes = {}
    for file in sorted(f for f in runs.glob("*/*-*/**/*") if f.is_file() and f.name != MACHINE):
        if file.name == "measurements.json":
            told = json.loads(file.read_text())
            del told["reused"]
            file.write_text(json.dumps(told))
        hashes[file.relative_to(runs).as_posix()] = sha256(file)
    return hashes


@pytest.fixture(scope="module")
def places(tiny_llama, tiny_jsonl, tmp_path_factory):
    """The runs of two folders; the second reads the cache that the first filled."""
    root = tmp_path_factory.mktemp("places")
    common = {
        "PATH": os.environ["PATH"], "HOME": str(root), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1", "LLMQ_CACHE": str(root / "cache"),
    }  # fmt: skip
    here = {**common, "LANG": "C", "PYTHONHASHSEED": "1"}
    there = {"PYTHONHASHSEED": "2", "LANG": "C.UTF-8", "ADDED": "1", **dict(reversed(common.items()))}
    first = run_in(root / "a", tiny_llama, tiny_jsonl, here)
    return first, run_in(root / "an Öther place" / "deeper" / "b", tiny_llama, tiny_jsonl, there)


@pytest.mark.slow
def test_two_places_locales_hash_seeds_and_caches_give_the_same_bytes(places):
    one, other = map(bytes_of_stages, places)
    assert one == other
    stages = {name.rsplit("/", 1)[0] for name in one if name.endswith("artifact.json")}
    assert len(stages) == 5 + 2 + 4
    assert {f"{stage}/{MACHINE}" for stage in stages} == {
        file.relative_to(places[0]).as_posix() for file in places[0].rglob(MACHINE)
    }


@pytest.mark.slow
def test_an_adapter_names_its_base_as_the_recipe_does_or_from_its_own_folder(places):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    for runs in places:
        for adapter, named in (("adapter/1-adapt.lora", "model"), ("text/2-adapt.lora", "../1-quantize.bnb")):
            folder = runs / adapter
            told = json.loads((folder / "adapter_config.json").read_text())
            assert told["base_model_name_or_path"] == named
            assert "base_model" not in (folder / "README.md").read_text()  # the hub takes names of the hub alone
            base = folder.parent.parent.parent / named if named == "model" else folder / named
            plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
            with Artifact.load(folder).open("cpu") as loaded:
                ours = logits_of(loaded.module, some_ids())
            assert torch.equal(logits_of(PeftModel.from_pretrained(plain, folder).eval(), some_ids()), ours)


@pytest.mark.slow
def test_a_run_opens_after_it_was_moved_alone_or_together_with_its_base(places, tmp_path):
    runs = places[1]
    with Artifact.load(runs / "adapter" / "1-adapt.lora").open("cpu") as loaded:
        before = logits_of(loaded.module, some_ids())
    alone = shutil.copytree(runs / "adapter", tmp_path / "alone") / "1-adapt.lora"
    together = shutil.copytree(runs.parent, tmp_path / "together") / "runs" / "adapter" / "1-adapt.lora"
    assert Artifact.load(alone).weights == runs.parent / "model"
    (runs.parent / "model").rename(runs.parent / "gone")
    assert Artifact.load(together).weights == tmp_path / "together" / "model"
    with Artifact.load(together).open("cpu") as loaded:
        assert torch.equal(logits_of(loaded.module, some_ids()), before)
    with pytest.raises(UserError, match="there is no such folder"):
        stages_of(str(alone), "causal_lm", ["size"])
    (alone / MACHINE).unlink()
    with pytest.raises(UserError, match=f"no {MACHINE} beside it says where"):
        stages_of(str(alone), "causal_lm", ["size"])
