"""Whose data a run is measured on: its own, unless somebody says otherwise; and what cannot fit is refused at once."""

import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers import CPU, base_of, exit_code
from PIL import Image

from llmq import pipeline, plugin, reading, recipe
from llmq.errors import UserError
from llmq.source import Source, to_yaml
from llmq.targets import stages_of

NET = {
    "timm_classifier": {
        "architecture": "resnet10t",
        "model_args": {"channels": [8, 8, 8, 8]},
        "classes": 2,
        "input_size": 32,
    }
}
SRCNN = {"srcnn": {"scale": 3}}
FCOS = {"torchvision_detector": {"architecture": "fcos", "backbone": "small", "classes": 2}}
ROCK = {"train_slices": 2, "held_out_slices": 3, "size": 48}
LORA = {"r": 2, "max_length": 64, "max_steps": 1, "per_device_train_batch_size": 2}
TEXT = {"causal_lm": {"weights": "org/name"}}


def job(model: Any, steps: Iterable[Any], evaluate: Any, **others: Any) -> recipe.Recipe:
    """A recipe, its words built and its data found."""
    source = Source("r", {"model": model, "steps": list(steps), "evaluate": evaluate, **others})
    return recipe.built(source, "r")


def reads(made: recipe.Recipe) -> dict[str, list[str]]:
    """What each task reads."""
    return {n: [reading.called(d) for d in reading.data_of(t)] for n, t in reading.by_name(made.evaluate).items()}


def noise(folder: Path, names: Iterable[str]) -> Path:
    """Small images of noise."""
    folder.mkdir(parents=True)
    for name in names:
        pixels = np.random.default_rng([*f"{folder.name}/{name}".encode()]).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def pets(tmp_path):
    """Ten cats and fifteen dogs, of which a fifth is held out."""
    for name, n in (("cat", 10), ("dog", 15)):
        noise(tmp_path / "pets" / name, map(str, range(n)))
    return tmp_path / "pets"


@pytest.fixture
def yolo(tmp_path):
    """Three images to train on and two held out, with boxes of two classes, as YOLO writes them."""
    for part, n in (("train", 3), ("val", 2)):
        noise(tmp_path / "yolo/images" / part, map(str, range(n)))
        (tmp_path / "yolo/labels" / part).mkdir(parents=True)
        for i in range(n):
            (tmp_path / "yolo/labels" / part / f"{i}.txt").write_text(f"{i % 2} 0.5 0.5 0.5 0.5\n")
    (tmp_path / "yolo/data.yaml").write_text("train: images/train\nval: images/val\nnames: {0: three, 1: seven}\n")
    return tmp_path / "yolo"


@pytest.fixture
def questions(tmp_path):
    """Forty rows whose columns have names of their own."""
    rows = [{"query": f"What is {i} plus 1? ", "reply": f"It is {i + 1}."} for i in range(40)]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "my.jsonl"


# Which data it is.


@pytest.mark.parametrize(
    ("steps", "task", "read"),
    [
        ([], "perplexity", "data.pydoc"),
        (["quantize.bnb"], "generate", "data.docstrings"),
        ([{"adapt.lora": {"data": "my.jsonl"}}], "perplexity", "data.file my.jsonl"),
        ([{"adapt.lora": {"data": "my.jsonl"}}], "divergence", "data.file my.jsonl"),
        ([{"quantize.gptq": {"data": "my.jsonl"}}], "perplexity", "data.file my.jsonl"),
        (
            [{"quantize.gptq": {"data": "c4.jsonl"}}, {"adapt.lora": {"data": "my.jsonl"}}],
            "perplexity",
            "data.file my.jsonl",
        ),
        ([{"adapt.lora": {"data": "my.jsonl"}}, "adapt.merge"], "perplexity", "data.file my.jsonl"),
        (
            [{"adapt.lora": {"data": "a.jsonl"}}, "adapt.merge", {"adapt.lora": {"data": "b.jsonl"}}],
            "perplexity",
            "data.file b.jsonl",
        ),
        ([{"adapt.lora": {"data": "my.jsonl"}}], {"perplexity": {"data": "pydoc"}}, "data.pydoc"),
    ],
)
def test_a_task_reads_what_trains_else_what_calibrates_else_its_own(steps, task, read):
    ((found,),) = reads(job(TEXT, steps, [task])).values()
    assert found == read


def test_a_step_that_names_no_data_reads_what_was_trained_on_before_it():
    made = job(TEXT, ["quantize.gptq", {"adapt.lora": {"data": "my.jsonl"}}, "adapt.merge", "quantize.gptq"], [])
    found = [reading.called(data) for step in made.steps for data in reading.data_of(step)]
    assert found == ["data.pydoc", *["data.file my.jsonl"] * 3]


def test_data_that_has_no_boxes_is_not_taken_to_find_boxes_in():
    assert reads(job(FCOS, [{"quantize.int8": {"data": "photographs"}}], ["detection"])) == {
        "detection": ["data.scenes"]
    }
    with_boxes = [{"adapt.train": {"data": "yolo"}}, {"quantize.int8": {"data": "photographs"}}]
    assert reads(job(FCOS, with_boxes, ["detection"])) == {"detection": ["data.coco yolo"]}


def test_data_whose_shape_is_known_not_to_fit_is_refused_unread():
    with pytest.raises(UserError, match=r"'tasks\.detection' reads image/boxes, and 'data\.photographs' is image"):
        job(FCOS, [], [{"detection": {"data": "photographs"}}])


def test_a_suite_of_upscaling_reads_the_scale_that_is_trained():
    train = {"adapt.train": {"data": {"rock": {"scale": 3}}}}
    assert set(map(tuple, reads(job(SRCNN, [train], "rock-sr")).values())) == {(), ("data.rock scale=3",)}
    assert reads(job({"edsr": {}}, [], "rock-sr"))["fidelity"] == ["data.rock"]


def test_a_gan_draws_latents_whatever_it_was_trained_on(pets):
    made = job({"dcgan": {}}, [{"adapt.train": {"data": str(pets)}}], "gan")
    assert not any(reads(made).values())


def test_what_was_found_is_written_down_and_said_where_it_comes_from(questions):
    steps = [{"adapt.lora": {"data": str(questions)}}]
    made = job(TEXT, steps, ["perplexity", {"generate": {"data": "docstrings"}}])
    again = recipe.built(Source("r", yaml.safe_load(to_yaml(made.plain()))), "r")
    assert made.plain()["evaluate"][0] == {"perplexity": {"data": {"file": {"path": str(questions)}}}}
    assert again == made
    for one in (made, again):
        assert reading.told(one.steps, one.evaluate) == [
            f"adapt.lora trains on data.file {questions}",
            f"perplexity reads data.file {questions}, what adapt.lora trains on",
            "generate reads data.docstrings, which no step reads",
        ]


@pytest.mark.parametrize(
    ("model", "path", "word"),
    [
        (TEXT, "rows.jsonl", "file"),
        (TEXT, "owner/name", "hub"),
        (NET, "photos/", "image_folder"),
        (NET, "photos", "image_folder"),
        ({"dcgan": {}}, "photos", "image_folder"),
        (FCOS, "boxes", "coco"),
        (FCOS, "annotations.json", "coco"),
        (SRCNN, "volume.npz", "rock"),
        (SRCNN, "DRSRD1_2D", "rock"),
    ],
)
def test_a_bare_path_means_the_data_of_the_models_kind(model, path, word):
    step = {"causal_lm": "adapt.lora"}.get(next(iter(model)), "adapt.train")
    (data,) = reading.data_of(job(model, [{step: {"data": path}}], []).steps[0])
    assert data.word == f"data.{word}"
    assert Path(data.path) == Path(path)  # type: ignore[attr-defined]


# Whole runs.


@pytest.mark.slow
def test_a_detector_of_two_classes_is_measured_on_its_own(yolo, tmp_path):
    made = job(FCOS, [{"adapt.train": {"data": str(yolo), "max_steps": 1}}], "detector")
    tasks = [task for task in made.evaluate if task.word == "tasks.detection"]
    report = pipeline.run(made.model_copy(update={"evaluate": tuple(tasks)}), tmp_path / "run")
    own = plugin.build({"coco": {"path": str(yolo)}}, "data").read()
    assert report is not None
    found = [m for m in report.measurements if m["metric"] == "map"]
    assert {(m["n"], f"data.coco held_out, sha256 {own.sha256[:12]}" in m["convention"]) for m in found} == {(2, True)}
    assert f"detection reads data.coco {yolo}, what adapt.train trains on" in report.environment["reads"]
    assert yaml.safe_load((tmp_path / "run/recipe.yaml").read_text())["evaluate"] == [
        {"detection": {"data": {"coco": {"path": str(yolo)}}}}
    ]
    assert f"reads data.coco {yolo}" in (tmp_path / "run/report.md").read_text()


@pytest.mark.slow
def test_a_classifier_and_its_stages_read_the_held_out_part_of_its_folder(pets, tmp_path):
    own = plugin.build({"image_folder": {"path": str(pets)}}, "data").read()
    assert len(own.held_out) == 5
    made = job(NET, [{"adapt.train": {"data": str(pets), "max_steps": 1}}], ["accuracy"])
    report = pipeline.run(made, tmp_path / "run")
    assert report is not None
    assert {m["n"] for m in report.measurements} == {5}
    bring, tasks = stages_of(str(tmp_path / "run/1-adapt.train"), "causal_lm", "classifier")
    (artifact,) = (b(CPU) for b in bring.values())
    (asked,) = (t for t in tasks if t.word == "tasks.accuracy")
    with artifact.open("cpu") as loaded:
        model: Any = artifact.model
        right = model.logits(loaded, [e.image for e in own.held_out]).argmax(1).tolist()
        top1 = next(m for m in asked.score(loaded) if getattr(m, "metric", "") == "top1")
    assert top1.value == np.mean([r == e.label for r, e in zip(right, own.held_out, strict=True)])  # type: ignore[union-attr]
    for changes, word in (([], "data.image_folder"), (["accuracy.data=photographs"], "data.photographs")):
        (task,) = stages_of(str(tmp_path / "run"), "causal_lm", ["accuracy"], changes)[1]
        assert [data.word for data in reading.data_of(task)] == [word]


def test_a_stage_is_asked_on_what_the_task_of_that_name_read_in_its_run(tmp_path, questions):
    stage = tmp_path / "run/0-base"
    stage.mkdir(parents=True)
    model = {"models.causal_lm": {"weights": "org/name"}}
    about = {"model": model, "weights": str(tmp_path), "adapter": None, "measurements": [], "notes": {}}
    (stage / "artifact.json").write_text(json.dumps({**about, "runtime": "torch", "packed": False, "history": []}))
    evaluate = ["perplexity", {"perplexity": {"data": {"pydoc": {"held_out": 0.2}}}}]
    data = {"file": {"path": str(questions), "columns": {"prompt": "query", "completion": "reply"}}}
    made = job(TEXT, [{"adapt.lora": {"data": data}}], evaluate)
    (tmp_path / "run/recipe.yaml").write_text(to_yaml(made.plain()))
    asked = ["perplexity", "perplexity", "divergence"]
    tasks = stages_of(str(stage), "causal_lm", asked)[1]
    first, second, third = ([reading.called(d) for d in reading.data_of(task)] for task in tasks)
    assert first == third
    assert "my.jsonl" in first[0]
    assert second == ["data.pydoc held_out=0.2"]
    questions.rename(tmp_path / "elsewhere.jsonl")
    with pytest.raises(
        UserError, match=r"there is no file .*my\.jsonl.*name other data, such as perplexity\.data=pydoc"
    ):
        stages_of(str(stage), "causal_lm", ["perplexity"])
    assert stages_of(str(stage), "causal_lm", ["perplexity"], ["perplexity.data=pydoc"])
    (tmp_path / "run/recipe.yaml").unlink()
    assert [reading.called(d) for t in stages_of(str(stage), "causal_lm", asked)[1] for d in reading.data_of(t)] == [
        "data.pydoc"
    ] * 3


def a_stage(folder: Path, made: recipe.Recipe) -> Path:
    """The first stage of a run of a recipe, without weights."""
    stage = folder / "0-base"
    stage.mkdir(parents=True)
    model = {"models.causal_lm": {"weights": "org/name"}}
    about = {"model": model, "weights": ".", "adapter": None, "measurements": [], "notes": {}}
    (stage / "artifact.json").write_text(json.dumps({**about, "runtime": "torch", "packed": False, "history": []}))
    (folder / "recipe.yaml").write_text(to_yaml(made.plain()))
    return stage


def test_a_stage_as_the_weights_of_another_recipe_brings_what_its_run_read(tmp_path, questions, tiny_llama):
    other = {"perplexity": {"data": {"pydoc": {"held_out": 0.2}}}}
    first = job(TEXT, [{"adapt.lora": {"data": str(questions)}}], ["perplexity", other])
    stage = a_stage(tmp_path / "run", first)
    shutil.copytree(tiny_llama, stage, dirs_exist_ok=True)
    model = {"causal_lm": {"weights": str(stage)}}
    mine = f"data.file {questions}"
    both = ["perplexity", "perplexity"]
    assert reads(job(model, [], both)) == {"perplexity": [mine], "perplexity-2": ["data.pydoc held_out=0.2"]}
    made = job(model, ["quantize.gptq"], ["perplexity"])
    assert [reading.called(d) for d in reading.data_of(made.steps[0])] == [mine]
    made_by = recipe.of_weights(made.model)
    assert made_by is not None
    assert f"perplexity reads {mine}, what adapt.lora trains on" in reading.told((), made.evaluate, made_by.steps)
    anew = job(model, [{"adapt.lora": {"data": "pydoc"}}], both)
    assert list(reads(anew).values()) == [["data.pydoc"]] * 2
    assert reads(job(TEXT, [], ["perplexity"])) == {"perplexity": ["data.pydoc"]}
    questions.unlink()
    with pytest.raises(UserError, match=r"my\.jsonl'; the run read .*name other data, such as perplexity\.data=pydoc"):
        recipe.parse(Source("r", {"model": model, "steps": [], "evaluate": ["perplexity"]}), "r")


@pytest.mark.parametrize("moved", ["nothing", "the run", "both"])
def test_relative_paths_of_a_run_are_meant_from_where_it_was_called(tmp_path, monkeypatch, moved):
    home = tmp_path / "home"
    home.mkdir()
    (home / "my.jsonl").write_text("".join(f'{{"text": "The number {i}."}}\n' for i in range(20)))
    made = job(TEXT, [{"adapt.lora": {"data": "my.jsonl"}}], ["perplexity"])
    run = home / "runs/x"
    a_stage(run, made)
    about = {"environment": {"called_from": str(home), "run": str(run)}}
    (run / "report.json").write_text(json.dumps(about))
    (tmp_path / "my.jsonl").write_text('{"text": "of somebody else"}\n')
    monkeypatch.chdir(tmp_path)
    if moved == "the run":
        run = run.rename(tmp_path / "y")
    elif moved == "both":
        home = home.rename(tmp_path / "elsewhere")
        run = home / "runs/x"
    (task,) = stages_of(str(run / "0-base"), "causal_lm", ["perplexity"])[1]
    assert [reading.called(data) for data in reading.data_of(task)] == [f"data.file {home / 'my.jsonl'}"]


def test_a_recipe_that_another_tool_left_beside_a_model_is_none_of_ours(tiny_llama, tmp_path):
    shutil.copytree(tiny_llama, tmp_path / "m")
    (tmp_path / "m/recipe.yaml").write_text("default_stage:\n  default_modifiers:\n    SmoothQuantModifier: {}\n")
    assert recipe.of_run(str(tmp_path / "m")) is None
    assert list(stages_of(str(tmp_path / "m"), "causal_lm", ["size"])[0]) == ["0-base"]


@pytest.mark.parametrize(
    ("evaluate", "says"),
    [
        (["tasks.size"], "unknown word 'tasks.size'; did you mean 'size'?"),
        ([{"perplexity": {"data": "data.pydoc"}}], "unknown word 'data.pydoc'; did you mean 'pydoc'?"),
        ([{"perplexity": {"data": {"data.pydoc": {}}}}], "unknown word 'data.pydoc'; did you mean 'pydoc'?"),
    ],
)
def test_a_word_that_says_its_package_again_is_quoted_as_it_stands(evaluate, says):
    with pytest.raises(UserError, match=re.escape(says)):
        job(TEXT, [], evaluate)
    with pytest.raises(UserError, match=re.escape("unknown word 'models.causal_lm'; did you mean 'causal_lm'?")):
        job({"models.causal_lm": {"weights": "org/name"}}, [], [])


@pytest.mark.parametrize(
    "columns",
    [
        ["--columns", "prompt=query,completion=reply"],
        ["adapt.lora.data.file.columns={prompt: query, completion: reply}"],
        ["adapt.lora.data.columns.prompt=query", "adapt.lora.data.columns.completion=reply"],
    ],
)
def test_columns_of_finetune_reach_what_it_is_measured_on(
    columns, tiny_llama, questions, tmp_path, monkeypatch, capsys
):
    ran: list[recipe.Recipe] = []
    monkeypatch.setattr(pipeline, "run", lambda job, *_: ran.append(job))
    assert exit_code("finetune", tiny_llama, questions, *columns) == 0
    trained, measured, other = (data for part in (*ran[0].steps, *ran[0].evaluate) for data in reading.data_of(part))
    assert trained == measured
    assert trained.columns == {"prompt": "query", "completion": "reply"}  # type: ignore[attr-defined]
    assert other.word == "data.pydoc"
    assert len(measured.read().held_out) == 4


# What cannot fit.


def refused(made: recipe.Recipe) -> str:
    """What is said before the first step."""
    with pytest.raises(UserError) as error:
        pipeline.bring(made, CPU)
    return str(error.value)


def test_data_of_another_scale_is_refused_before_the_training():
    train = {"adapt.train": {"data": {"rock": {**ROCK, "scale": 3}}, "max_steps": 1}}
    own = job(SRCNN, [train], ["super_resolution"])
    assert pipeline.bring(own, CPU)
    other = job(SRCNN, [train], [{"super_resolution": {"data": {"rock": ROCK}}}])
    assert "super_resolution: synthetic train 0 is 12 x 12 to 48 x 48: not scale 3" in refused(other)
    assert "no larger than distance 48" in refused(job(SRCNN, [train], [{"rock": {"distance": 48}}]))


def test_classes_that_the_network_does_not_tell_apart_are_refused(yolo, pets):
    train = {"adapt.train": {"data": str(yolo), "max_steps": 1}}
    assert "10 classes, and this network has 2" in refused(job(FCOS, [train], [{"detection": {"data": "scenes"}}]))
    step = {"adapt.train": {"data": str(pets), "max_steps": 1}}
    assert "10 classes, and this network has 2" in refused(job(NET, [step], [{"accuracy": {"data": "digits"}}]))


def test_other_classes_under_the_same_numbers_are_refused(pets, tmp_path):
    for name in ("bird", "cat"):
        noise(tmp_path / "birds" / name, map(str, range(10)))
    step = {"adapt.train": {"data": str(pets), "max_steps": 1}}
    made = job(NET, [step], [{"accuracy": {"data": str(tmp_path / "birds")}}])
    said = refused(made)
    assert "accuracy: class 0 of data.image_folder" in said
    assert "is 'bird', and the network learns 'cat' there" in said
    stage = {"0-base": made.model.base(CPU)}
    with pytest.raises(UserError, match="the network learns 'cat' there"):
        pipeline.evaluate(stage, made.evaluate, tmp_path / "eval", CPU, {}, steps=made.steps)


def test_images_without_labels_cannot_be_learned_from(pets):
    bare = {"image_folder": {"path": str(pets), "labels": False}}
    assert "has no label to learn from" in refused(job(NET, [{"adapt.train": {"data": bare}}], []))


def test_text_that_holds_nothing_out_or_leaves_no_token_is_refused(tiny_llama, tiny_jsonl):
    model = {"causal_lm": {"weights": str(tiny_llama)}}
    whole = {"file": {"path": str(tiny_jsonl), "held_out": 0}}
    said = refused(job(model, [{"adapt.lora": {"data": whole, **LORA}}], ["perplexity"]))
    assert "perplexity: the held-out part of data.file is empty" in said
    short = {"adapt.lora": {**LORA, "data": str(tiny_jsonl), "max_length": 4}}
    assert "no row that leaves a token to learn or to score within 4 tokens" in refused(job(model, [short], []))
    assert pipeline.bring(job(model, [{"adapt.lora": {"data": str(tiny_jsonl), **LORA}}], ["perplexity"]), CPU)


def test_check_names_what_is_read_and_with_data_reads_it(tmp_path, monkeypatch, capsys):
    rock = {"rock": ROCK}
    plain = {"model": SRCNN, "steps": [{"adapt.train": {"data": rock}}], "evaluate": [{"rock": {"distance": 8}}]}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(plain))
    assert exit_code("check", tmp_path / "r.yaml") == 0
    out = capsys.readouterr().out
    assert "\n# rock reads data.rock size=48 train_slices=2 held_out_slices=3, what adapt.train trains on\n" in out
    assert yaml.safe_load(out)["evaluate"] == [{"rock": {"data": rock, "distance": 8}}]
    assert exit_code("check", tmp_path / "r.yaml", "--data") == 2
    assert "not scale 3 of models.srcnn" in capsys.readouterr().err
    assert exit_code("check", tmp_path / "r.yaml", "--data", "model.scale=4") == 0
    assert ": 2 to train on, 3 held out, low/high\n" in capsys.readouterr().out


def test_eval_takes_changes_of_tasks_and_of_a_model_that_is_no_stage(tiny_llama, tmp_path, monkeypatch, capsys):
    (tmp_path / "s.yaml").write_text("- perplexity\n")
    words = ("eval", tiny_llama, "perplexity.limit=2", "perplexity.window=32", "--suite", tmp_path / "s.yaml")
    more = ("model.dtype=float32", "--out", tmp_path / "out", "--json")
    assert exit_code(*words, *more) == 0
    report = json.loads(capsys.readouterr().out)
    assert {m["n"] for m in report["measurements"]} == {2}
    assert report["recipe"]["evaluate"] == [{"perplexity": {"data": "pydoc", "window": 32, "limit": 2}}]
    assert report["environment"]["dtype"] == "float32"
    assert report["environment"]["reads"] == ["perplexity reads data.pydoc, which no step reads"]
    stage = tmp_path / "out/0-base"
    assert not (stage / "artifact.json").exists()
    assert exit_code(*words, "speed.rounds=3") == 2
    assert "this recipe has no 'speed'" in capsys.readouterr().err


def test_calibration_looks_at_no_label():
    opener: Any = plugin.build(NET, "models")
    model: Any = opener.base(CPU).model
    digits: Any = plugin.build("digits", "data")
    assert model.outputs == 2
    assert len(list(model.calibration(digits.read(), 3, 0))) == 3


@pytest.mark.parametrize("place", ["data", "calibration"])
def test_a_resumed_stage_that_was_made_from_other_data_is_refused(place, tiny_llama, tiny_jsonl, tmp_path):
    data = shutil.copy(tiny_jsonl, tmp_path / "rows.jsonl")
    step = plugin.build({"adapt.lora": {"data": str(data), **LORA}})
    told = {"word": "data.file", "sha256": step.data.read().sha256}
    notes = {"data": told} if place == "data" else {"calibration": {"data": told}}
    base = base_of(tiny_llama)
    folder = tmp_path / "1-adapt.lora"
    folder.mkdir()
    base.then(step, notes=notes).save(folder)
    assert pipeline.make_stage(step, base, folder, CPU).notes == notes
    Path(data).write_text(tiny_jsonl.read_text() + tiny_jsonl.read_text().splitlines()[0] + "\n")
    step = plugin.build({"adapt.lora": {"data": str(data), **LORA}})
    with pytest.raises(UserError, match=r"1-adapt.lora' was made from other data than data.file .*rows.jsonl"):
        pipeline.make_stage(step, base, folder, CPU)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"])
def test_a_resumed_run_whose_base_was_replaced_is_refused(name, tiny_llama, tmp_path):
    weights = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    base, folder = base_of(weights), tmp_path / "run" / "0-base"
    folder.parent.mkdir()
    pipeline.make_stage(None, base, folder, CPU)
    (weights / "notes.json").write_text("{}")
    os.utime(weights / "model.safetensors", (1, 1))  # the same again, copied from elsewhere
    pipeline.make_stage(None, base, folder, CPU)
    (weights / name).write_bytes((weights / name).read_bytes()[:-1] + b" ")  # of the same length
    with pytest.raises(UserError, match=rf"0-base' began from another {name} than lies in '.*base' now; bring back"):
        pipeline.make_stage(None, base, folder, CPU)


def test_a_half_stage_that_was_begun_with_other_data_is_refused(tiny_llama, tiny_jsonl, tmp_path, monkeypatch):
    """Blocks rounded by the old calibration, or a training on the old rows, would be told as made from the new ones."""
    data = Path(shutil.copy(tiny_jsonl, tmp_path / "rows.jsonl"))
    word = {"quantize.gptq": {"data": str(data), "samples": 2, "length": 16, "group_size": 32}}
    base, folder = base_of(tiny_llama), tmp_path / "1-quantize.gptq"
    with monkeypatch.context() as patch:
        patch.setattr("llmq.text.blockwise.finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pipeline.make_stage(plugin.build(word), base, folder, CPU)
    rows = data.read_text()
    data.write_text(rows + rows.splitlines()[0] + "\n")
    with pytest.raises(UserError, match=r"1-quantize.gptq' was made from other data than data.file .*rows.jsonl"):
        pipeline.make_stage(plugin.build(word), base, folder, CPU)
    data.write_text(rows)
    pipeline.make_stage(plugin.build(word), base, folder, CPU)
    assert not (folder / pipeline.BEGUN).exists()


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt
