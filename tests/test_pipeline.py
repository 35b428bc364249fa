"""The whole job on a tiny model: what it leaves, and that it can be killed anywhere."""

import json

import pytest
import yaml
from helpers import CPU

from llmq import pipeline, recipe
from llmq.errors import UserError
from llmq.report import Report


@pytest.fixture
def job(tiny_llama, tiny_jsonl, tmp_path):
    """A recipe file for the tiny model."""
    lora = {"data": str(tiny_jsonl), "r": 4, "max_length": 64, "max_steps": 2, "per_device_train_batch_size": 2}
    plain = {
        "model": {"causal_lm": {"weights": str(tiny_llama)}},
        "steps": [{"quantize.bnb": {"bits": 4}}, {"adapt.lora": lora}],
        "evaluate": [
            "size",
            {"perplexity": {"data": str(tiny_jsonl), "part": "all"}},
            {"generate": {"data": str(tiny_jsonl), "examples": 1, "max_new_tokens": 3}},
            {"speed": {"prompt_tokens": 8, "new_tokens": 2, "rounds": 3}},
        ],
        "seed": 0,
    }
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(plain))
    return file


def test_a_run_leaves_a_report_that_sets_every_stage_beside_the_base(job, tmp_path):
    out = tmp_path / "run"
    pipeline.run(recipe.load(str(job)), out)
    data = json.loads((out / "report.json").read_text())
    names = [s["name"] for s in data["stages"]]
    assert data["schema_version"] == 2
    assert names == ["0-base", "1-quantize.bnb", "2-adapt.lora"]
    assert [s["step"] for s in data["stages"]] == [None, "quantize.bnb", "adapt.lora"]
    needed = {"stage", "task", "metric", "value", "unit", "better", "n", "stderr", "convention", "exact"}
    assert all(set(m) == needed for m in data["measurements"])
    compared = {(c["stage"], c["metric"]): c for c in data["comparisons"]}
    assert compared["1-quantize.bnb", "bytes_on_disk"]["verdict"] == "better"
    verdicts = {c["metric"]: c["verdict"] for c in data["comparisons"]}
    assert set(verdicts.values()) <= {"better", "worse", "same", "undecided", "unknown"}
    assert verdicts["parameters"] == "unknown"  # those of the adapter
    assert all((name, "decode_tokens_per_second") in compared for name in names[1:])
    assert [e["stage"] for e in data["exhibits"]] == names
    assert {"libraries", "processor", "threads", "seed", "dtype", "model_sha256", "device"} <= set(data["environment"])

    markdown, html = (out / "report.md").read_text(), (out / "report.html").read_text()
    assert all(name in markdown and name in html for name in names)
    assert "<svg" in html
    assert "http" not in html.replace("http://www.w3.org", ""), "the page must be self-contained"
    rows = [json.loads(line) for line in (out / "0-base/samples/perplexity.token_perplexity.jsonl").open()]
    assert len(rows) == 20
    assert not list(out.glob(".*.partial"))
    assert (out / "log.txt").read_text()


@pytest.mark.slow
def test_a_killed_run_goes_on_after_its_last_whole_stage(job, tmp_path, monkeypatch):
    out = tmp_path / "run"
    loaded = recipe.load(str(job))
    with monkeypatch.context() as patch:
        patch.setattr(type(loaded.steps[1]), "apply", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(loaded, out)
    assert (out / "1-quantize.bnb").exists()
    assert not (out / "2-adapt.lora").exists()
    packed = (out / "1-quantize.bnb/model.safetensors").stat().st_mtime_ns
    pipeline.run(loaded, out, resume=True)
    assert (out / "1-quantize.bnb/model.safetensors").stat().st_mtime_ns == packed, "a whole stage is not made again"

    whole = tmp_path / "whole"
    pipeline.run(loaded, whole)
    for file in ("1-quantize.bnb/model.safetensors", "2-adapt.lora/adapter_model.safetensors"):
        assert (whole / file).read_bytes() == (out / file).read_bytes()
    noisy = ("time_to_first_token", "peak_memory", "peak_memory_of_process")
    figures = [
        [m for m in Report.read(f).measurements if "per_second" not in m["metric"] and m["metric"] not in noisy]
        for f in (out, whole)
    ]
    assert figures[0] == figures[1]


def test_a_folder_with_another_recipe_is_not_resumed(job, tmp_path):
    out = tmp_path / "run"
    loaded = recipe.load(str(job))
    pipeline.check_folder(loaded, out, resume=False)
    out.mkdir()
    (out / "recipe.yaml").write_text(pipeline.to_yaml(loaded.plain()))
    pipeline.check_folder(loaded, out, resume=True)
    with pytest.raises(UserError, match="another recipe"):
        pipeline.check_folder(recipe.load(str(job), ["seed=1"]), out, resume=True)


@pytest.mark.slow
def test_only_the_ends_are_evaluated_where_the_recipe_says_so(job, tmp_path):
    report = pipeline.run(recipe.load(str(job), ["stages=ends"]), tmp_path / "run")
    assert {m["stage"] for m in report.measurements} == {"0-base", "2-adapt.lora"}
    assert len(report.stages) == 3


def test_a_run_and_each_stage_of_it_can_be_evaluated_again_elsewhere(job, tmp_path):
    from llmq.targets import stages_of

    pipeline.run(recipe.load(str(job), ["evaluate=[size]"]), tmp_path / "run")
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    for target, expected in ((moved, 3), (moved / "2-adapt.lora", 1)):
        bring, tasks = stages_of(str(target), "causal_lm", [{"perplexity": {"limit": 2, "window": 32}}])
        artifacts = {name: b(CPU) for name, b in bring.items()}
        report = pipeline.evaluate(artifacts, tasks, tmp_path / f"eval-{expected}", CPU, {"target": str(target)})
        assert len(report.stages) == expected
        assert len(report.measurements) == 3 * expected


@pytest.mark.slow
def test_two_processes_train_together_to_what_one_trains_alone(job, tmp_path):
    """Plain gradient descent over twice the rows a step; a launcher that starts one process only would be seen."""
    import os
    import subprocess
    import sys

    lora = [
        "adapt.lora.optim=sgd",
        "adapt.lora.learning_rate=1.0",
        "adapt.lora.packing=false",
        "adapt.lora.max_steps=3",
    ]
    words = [str(job), "evaluate=[size]", "threads=1", *lora]
    two = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "llmq", "run", *words]
    done = subprocess.run(
        [*two, "adapt.lora.per_device_train_batch_size=2", "--out", str(tmp_path / "two")],
        capture_output=True,
        text=True,
        env=os.environ,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    pipeline.run(recipe.load(str(job), [*words[1:], "adapt.lora.per_device_train_batch_size=4"]), tmp_path / "one")
    one, both = (
        json.loads((tmp_path / n / "report.json").read_text())["stages"][2]["notes"]["training"] for n in ("one", "two")
    )
    assert (one["processes"], both["processes"]) == (1, 2)
    for (_, alone), (_, together) in zip(one["loss"], both["loss"], strict=True):
        assert together == pytest.approx(alone, rel=1e-2)
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == sorted(p.name for p in (tmp_path / "one").iterdir())
