"""What llmq writes beside a model is no part of it; kinds of numbers and files that would be read as others."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmq.answers import contents
from llmq.errors import UserError
from llmq.files import BESIDE, LAYERS
from llmq.guarded.weights import INDEX, SINGLE
from llmq.text.opening import check
from llmq.text.weights import check_folder
from tests.helpers import apply, base_of

DOWN = "model.layers.1.mlp.down_proj.weight"
OTHER_KINDS = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu, torch.complex64)


@pytest.fixture
def model(tiny_llama, tmp_path):
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def change(file, **tensors):
    save_file({**load_file(file), **tensors}, file, {"format": "pt"})


def leave_beside(folder):
    for name in BESIDE:
        if name.endswith(".json"):
            (folder / name).write_text('{"of": "another stage"}')
        else:
            (folder / name).mkdir(exist_ok=True)
            (folder / name / "one.json").write_text("{}")


@pytest.mark.parametrize("word", ["quantize.rtn", "quantize.bnb", "prune.magnitude"])
def test_nothing_that_was_measured_of_a_stage_goes_into_the_next(model, tmp_path, word):
    leave_beside(model)
    made = apply(word, base_of(model), tmp_path / "made").weights
    assert {f.name for f in made.iterdir()} & set(BESIDE) <= {LAYERS}
    assert not any("another stage" in file.read_text() for file in made.glob("*.json"))


def test_what_lies_beside_a_model_does_not_make_it_another(model):
    before = contents(model)
    leave_beside(model)
    assert contents(model) == before


@pytest.mark.parametrize("kind", OTHER_KINDS, ids=str)
def test_numbers_of_another_kind_in_place_of_a_weight_are_refused(model, kind):
    change(model / SINGLE, **{DOWN: load_file(model / SINGLE)[DOWN].to(kind)})
    with pytest.raises(UserError, match=rf"other numbers where weights belong \(1\): {DOWN}"):
        check(model)


def in_two_files(model, first, second):
    names = {"first.safetensors": first, "second.safetensors": second}
    for name, tensors in names.items():
        save_file(tensors, model / name, {"format": "pt"})
    (model / SINGLE).unlink()
    whole = {key: name for name, tensors in names.items() for key in tensors}
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": whole}))


def test_a_tensor_that_two_files_hold_is_refused(model):
    tensors = load_file(model / SINGLE)
    in_two_files(model, tensors, {DOWN: tensors[DOWN] * 3})
    with pytest.raises(UserError, match=rf"holds '{DOWN}' in two files"):
        check(model)


def test_an_index_without_metadata_is_one_line(model):
    tensors = load_file(model / SINGLE)
    in_two_files(model, {key: t for key, t in tensors.items() if key != DOWN}, {DOWN: tensors[DOWN]})
    check_folder(model)
    check(model)
    (model / INDEX).write_text(json.dumps({"weight_map": json.loads((model / INDEX).read_text())["weight_map"]}))
    with pytest.raises(UserError, match="has no 'metadata'"):
        check_folder(model)


def test_biases_of_zeros_beside_packed_weights_are_nothing_and_others_are_refused(model, tmp_path):
    packed = apply("quantize.rtn", base_of(model), tmp_path / "packed").weights
    file = next(f for f in sorted(packed.glob("*.safetensors")) if any("qweight" in key for key in load_file(f)))
    held = load_file(file)
    key = next(key for key in held if key.endswith(".qweight"))
    bias = key.replace(".qweight", ".bias")
    change(file, **{bias: torch.zeros(held[key].shape[1])})
    with base_of(packed).open("cpu"):
        pass
    change(file, **{bias: torch.ones(held[key].shape[1])})
    with pytest.raises(UserError, match=rf"more than is needed \(1\): {bias}"), base_of(packed).open("cpu"):
        pass
