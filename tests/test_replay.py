"""A run made again comes back byte for byte, and a run that was touched is found out."""

import json
import shutil

import pytest
import yaml
from helpers import exit_code

import llmq
from llmq import hashes, pipeline, recipe
from llmq.errors import UserError
from llmq.judge import replay


@pytest.fixture(scope="module")
def job(tiny_llama, tiny_jsonl, tmp_path_factory):
    """A recipe that prunes, quantizes and trains the tiny model."""
    lora = {"data": str(tiny_jsonl), "r": 4, "max_length": 64, "max_steps": 2, "per_device_train_batch_size": 2}
    plain = {
        "model": {"causal_lm": {"weights": str(tiny_llama)}},
        "steps": [{"prune.magnitude": {"sparsity": 0.5}}, {"quantize.rtn": {"bits": 4}}, {"adapt.lora": lora}],
        "evaluate": ["size", {"perplexity": {"data": str(tiny_jsonl), "part": "all"}}],
        "seed": 3,
    }
    file = tmp_path_factory.mktemp("job") / "job.yaml"
    file.write_text(yaml.safe_dump(plain))
    return file


@pytest.fixture(scope="module")
def run(job, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "first"
    pipeline.run(recipe.load(str(job)), out)
    return out


def copy_of(run, tmp_path):
    """A run to be damaged."""
    return shutil.copytree(run, tmp_path / "run")


@pytest.mark.slow
def test_prune_quantize_and_train_come_back_byte_for_byte(run, tmp_path):
    again = replay.replay(run, tmp_path / "again", lambda job, out: pipeline.run(job, out, cache=False))
    assert again.differences == []
    assert {d.what for d in again.surroundings} <= {"commit"}
    assert again.same
    compared = replay._of_stages(hashes.recorded(run))
    assert again.files == len(compared)
    weighed = {file.split("/")[0] for file in compared if file.endswith(".safetensors")}
    assert weighed == {"1-prune.magnitude", "2-quantize.rtn", "3-adapt.lora"}
    assert again.figures >= 6


@pytest.mark.slow
def test_another_seed_is_seen_in_what_was_trained_and_nowhere_before(run, job, tmp_path):
    pipeline.run(recipe.load(str(job), ["seed=4"]), tmp_path / "other")
    found = replay.beside(run, tmp_path / "other")
    assert not found.same
    assert {d.what.split("/")[0].split(":")[0] for d in found.differences} == {"3-adapt.lora"}
    assert {d.what for d in found.surroundings} - {"commit"} == {"seed"}


def test_a_run_left_alone_is_whole(run):
    found = replay.verify(run)
    assert found.whole
    assert found.same == len(hashes.recorded(run))
    assert not found.added


def test_a_changed_a_missing_and_an_added_file_are_named(run, tmp_path):
    damaged = copy_of(run, tmp_path)
    weights = min(damaged.glob("1-prune.magnitude/*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    (damaged / "recipe.yaml").unlink()
    (damaged / "note.txt").write_text("mine")
    found = replay.verify(damaged)
    assert (found.changed, found.missing, found.added) == (
        [f"1-prune.magnitude/{weights.name}"],
        ["recipe.yaml"],
        ["note.txt"],
    )
    assert not found.whole


def test_a_base_that_is_another_now_is_found_out(run, tmp_path):
    damaged = copy_of(run, tmp_path)
    report = json.loads((damaged / "report.json").read_text())
    report["environment"]["model_sha256"] = "0" * 64
    (damaged / "report.json").write_text(json.dumps(report))
    found = replay.verify(damaged)
    assert "not those that were measured" in found.base
    assert not found.whole


def test_a_file_that_would_be_opened_with_a_stage_is_not_harmless(run, tmp_path):
    added = copy_of(run, tmp_path)
    (added / "1-prune.magnitude/added_tokens.json").write_text("{}")
    found = replay.verify(added)
    assert found.added == ["1-prune.magnitude/added_tokens.json"]
    assert not found.whole


@pytest.mark.parametrize("target", ["stage", "folder"])
def test_the_base_of_an_evaluation_is_what_it_was_asked_about(run, tiny_llama, tmp_path, target):
    """An evaluation has no stage of its own: whatever became of the model, it was whole."""
    (tmp_path / "suite.yaml").write_text("- size\n")
    place = copy_of(run, tmp_path) / "1-prune.magnitude" if target == "stage" else tmp_path / "base"
    if target == "folder":
        shutil.copytree(tiny_llama, place)
    report = llmq.evaluate(place, suite=str(tmp_path / "suite.yaml"), out=tmp_path / "eval")
    assert replay.verify(report.folder).whole
    weights = min(place.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert "not those that were measured" in replay.verify(report.folder).base


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "generation_config.json"])
def test_what_asks_the_base_is_part_of_it(run, tmp_path, name):
    moved = copy_of(run, tmp_path)
    told = json.loads((moved / "0-base/machine.json").read_text())
    base = shutil.copytree(told["weights"][0], tmp_path / "base")
    (moved / "0-base/machine.json").write_text(json.dumps({**told, "weights": [str(base)]}))
    assert not replay.verify(moved).base
    (base / name).write_text((base / name).read_text() + "\n")
    found = replay.verify(moved)
    assert f"{name} is not the one that the run began from" in found.base
    assert not found.whole


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda f: None, "it is no run"),
        (lambda f: (f / "recipe.yaml").write_text("model: x"), "did not end"),
        (lambda f: (f / "hashes.json").write_text("{"), "holds no hashes"),
        (lambda f: (f / "hashes.json").write_text('{"files": 3}'), "holds no hashes"),
        (lambda f: (f / "hashes.json").write_text('{"files": {}}'), "no whole report.json"),
    ],
)
def test_what_is_no_run_is_refused_in_one_line(tmp_path, make, says):
    make(tmp_path)
    with pytest.raises(UserError, match=says) as caught:
        replay.verify(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_recipe_is_not_replayed(tmp_path):
    with pytest.raises(UserError, match="no recipe"):
        replay.replay(tmp_path, tmp_path / "again", pipeline.run)
    assert not (tmp_path / "again").exists()


def test_the_commands_end_with_0_the_same_1_differs_2_wrong_input(run, tmp_path, monkeypatch, capsys):
    assert exit_code("verify", run) == 0
    damaged = copy_of(run, tmp_path)
    (damaged / "log.txt").write_text("a log may grow")
    assert exit_code("verify", damaged, "--json") == 0
    (damaged / "report.md").write_text("# better figures")
    assert exit_code("verify", damaged) == 1
    assert "changed  report.md" in capsys.readouterr().out
    assert exit_code("verify", tmp_path / "nothing") == 2
    assert exit_code("replay", tmp_path / "nothing") == 2
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").write_text("x")
    assert exit_code("replay", run, "--out", tmp_path / "full") == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 3
    assert all(line.startswith("llmq: ") for line in said)
