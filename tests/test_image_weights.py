"""Image models hold what their files say: a tensor missing, renamed, turned, added or of another kind is one line.

The oracle of what may be opened is the untouched folder, opened to the network that wrote it, bit by bit.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CPU
from safetensors.torch import load_file, save_file
from test_hf_detector import CONFIGS

from llmq import plugin
from llmq.artifact import Artifact
from llmq.errors import UserError
from llmq.guarded.graphs import check_graph
from llmq.models import dcgan
from llmq.openvino_runtime import GRAPH, write_graph
from llmq.vision import efficientnet_lite0 as lite0
from llmq.vision import exported
from llmq.vision.exported import ExportedModule
from llmq.vision.exporting import export
from llmq.vision.state import read_state, save_network
from tests.exported_families import Heads

State = dict[str, torch.Tensor]

SMALL = {"n_resblocks": 1, "n_feats": 8}
DETECTOR = {"classes": 3, "size": 64}
OURS: dict[str, dict[str, Any]] = {
    "timm_classifier": {"architecture": "test_resnet", "classes": 3, "input_size": 32},
    "dcgan": {"features": 8},
    "srcnn": {},
    "srresnet": SMALL,
    "edsr": SMALL,
    "wdsr": SMALL,
    **{f"torchvision_detector {name}": {"architecture": name, **DETECTOR} for name in ("fcos", "retinanet")},
    "torchvision_detector faster_rcnn": {"architecture": "faster_rcnn", **DETECTOR},
}
"""Word, and which of its networks -> settings. They are kept in a folder of one file under their own names."""
RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic"}
VIT = {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32}
SWIN = {"model_type": "swin", "image_size": 32, "embed_dim": 8, "depths": [1], "num_heads": [2], "window_size": 4}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    **{f"hf_classifier {c['model_type']}": {"num_labels": 3, **c} for c in (RESNET, VIT, SWIN)},
    **{f"hf_detector {name}": {"model_type": name, **config} for name, config in CONFIGS.items()},
}
"""Word, and which of its networks -> configuration. transformers writes their folder."""
FAMILIES = [*OURS, *TRANSFORMERS]
HEAVY = {"hf_detector rt_detr", "hf_detector d_fine", "hf_detector yolos", "torchvision_detector faster_rcnn"}


def marked(names: list[str]) -> list[Any]:
    return [pytest.param(n, marks=pytest.mark.slow) if n in HEAVY else n for n in names]


def settings_of(family: str) -> tuple[str, dict[str, Any]]:
    word = family.split()[0]
    return word, OURS[family] if family in OURS else {"config": TRANSFORMERS[family]}


def network_of(family: str) -> Any:
    """The random network of a family, the same each time."""
    word, settings = settings_of(family)
    torch.manual_seed(0)
    return plugin.build({word: settings}, "models").network()


def opened(family: str, folder: Path) -> Artifact:
    """What a recipe makes of the folder."""
    word, settings = settings_of(family)
    model: Any = plugin.build({word: {**(settings if family in OURS else {}), "weights": str(folder)}}, "models")
    model.check()
    return model.base(CPU)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Callable[[str], Path]:
    """The folder of a family, made when it is first asked for."""
    made: dict[str, Path] = {}

    def folder_of(family: str) -> Path:
        if family not in made:
            network = network_of(family)
            made[family] = tmp_path_factory.mktemp("whole") / "m"
            made[family].mkdir()
            if family in OURS:
                save_network(network, made[family])
            else:
                network.model.save_pretrained(made[family])
        return made[family]

    return folder_of


@pytest.fixture
def changed(folders, tmp_path) -> Callable[[str, Callable[[State], None]], Path]:
    """A copy of a family's folder with other tensors."""

    def change(family: str, by: Callable[[State], None]) -> Path:
        folder = tmp_path / "m"
        shutil.copytree(folders(family), folder)
        state = load_file(folder / "model.safetensors")
        by(state)
        save_file({n: t.contiguous() for n, t in state.items()}, folder / "model.safetensors", {"format": "pt"})
        return folder

    return change


def a_weight(state: State) -> str:
    """A weight in the middle of the network that no turn leaves in its shape."""
    names = [n for n, t in state.items() if n.endswith(("weight", "original1")) and t.ndim > 1]
    return [n for n in names if state[n].shape[0] != state[n].shape[1]][-1]


def drop(state: State) -> str:
    return (name := a_weight(state), state.pop(name))[0]


def rename(state: State) -> str:
    name = a_weight(state)
    state[f"{name}_old"] = state.pop(name)
    return name


def transpose(state: State) -> str:
    name = a_weight(state)
    state[name] = state[name].transpose(0, 1)
    return name


def add(state: State) -> str:
    state["another.weight"] = torch.zeros(2, 2)
    return "another.weight"


def retype(state: State) -> str:
    name = a_weight(state)
    state[name] = (state[name] * 100).to(torch.int8)
    return name


def poison(state: State) -> str:
    name = a_weight(state)
    state[name].view(-1)[-1] = float("nan")
    return name


CHANGES = {f.__name__: f for f in (drop, rename, transpose, add, retype, poison)}


@pytest.mark.parametrize("family", marked(FAMILIES))
def test_a_whole_folder_opens_to_the_network_that_wrote_it(family, folders):
    with opened(family, folders(family)).open("cpu") as loaded:
        has = loaded.module.state_dict()
    wrote = network_of(family).state_dict()
    assert has.keys() == wrote.keys()
    assert all(torch.equal(has[name], tensor) for name, tensor in wrote.items())


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("family", marked(FAMILIES))
def test_a_tensor_that_is_not_what_the_network_needs_is_one_line(family, change, changed):
    names = []
    folder = changed(family, lambda state: names.append(CHANGES[change](state)))
    with pytest.raises(UserError) as error:
        opened(family, folder)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)
    assert names[0].rpartition(".")[2] in str(error.value)


@pytest.mark.parametrize("family", marked(FAMILIES))
def test_a_file_that_was_cut_is_one_line(family, folders, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(folders(family), folder)
    file = folder / "model.safetensors"
    for size in (file.stat().st_size // 2, 20, 0):
        file.write_bytes(file.read_bytes()[:size])
        with pytest.raises(UserError, match=r"model\.safetensors' is not a whole safetensors file: [^\n]*$"):
            opened(family, folder)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_no_tensor_may_be_missing(family, folders, tmp_path):
    """One of each kind, a kind being a name without its numbers; nothing reads the counters of batches."""
    stored = load_file(folders(family) / "model.safetensors")
    folder = tmp_path / "m"
    shutil.copytree(folders(family), folder)
    kinds = {re.sub(r"\d+", "#", name): name for name in stored if not name.endswith("num_batches_tracked")}
    for name in kinds.values():
        rest = {n: t for n, t in stored.items() if n != name}
        save_file(rest, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match="lacks"):
            opened(family, folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", ["timm_classifier", "hf_classifier resnet", "wdsr"])
def test_weights_may_be_stored_in_another_floating_dtype(family, dtype, changed):
    def store(state: State) -> None:
        for name, tensor in state.items():
            state[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor

    folder = changed(family, store)
    stored = load_file(folder / "model.safetensors")
    with opened(family, folder).open("cpu") as loaded:
        has = {name.removeprefix("model."): t for name, t in loaded.module.state_dict().items()}
    name = a_weight(stored)
    assert torch.equal(has[name.removeprefix("model.")], stored[name].float())


@pytest.mark.parametrize("family", ["timm_classifier", "hf_classifier resnet", "srresnet"])
def test_counters_of_batches_may_be_missing(family, changed):
    def forget(state: State) -> None:
        for name in [n for n in state if n.endswith("num_batches_tracked")]:
            del state[name]

    assert opened(family, changed(family, forget))


def test_a_number_too_large_for_float32_is_refused(changed):
    def grow(state: State) -> None:
        name = a_weight(state)
        state[name] = state[name].double().fill_(1e300)

    with pytest.raises(UserError, match=r"not finite numbers in"):
        opened("timm_classifier", changed("timm_classifier", grow))


def test_the_first_names_are_shown_and_all_are_counted(changed):
    def halve(state: State) -> None:
        for name in list(state)[: len(state) // 2]:
            del state[name]

    folder = changed("edsr", halve)
    lacks = len(load_file(folder / "model.safetensors"))
    with pytest.raises(UserError, match=rf"lacks '.*', '.*', '.*', … \(({lacks}|{lacks + 1}|{lacks - 1}) tensors\)"):
        opened("edsr", folder)


# One file, or an index and shards


def split(folder: Path) -> tuple[Path, State]:
    """The folder's weights in two files and an index instead."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = list(state)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, its in parts.items():
        save_file({n: state[n] for n in its}, folder / file, {"format": "pt"})
    weight_map = {n: file for file, its in parts.items() for n in its}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder, state


TWO = ["timm_classifier", "edsr", "hf_classifier resnet", "hf_detector detr"]


@pytest.fixture
def sharded(folders, tmp_path) -> Callable[[str], tuple[Path, State]]:
    def shard(family: str) -> tuple[Path, State]:
        return split(Path(shutil.copytree(folders(family), tmp_path / "s")))

    return shard


@pytest.mark.parametrize("family", TWO)
def test_shards_hold_what_the_single_file_held(family, sharded, folders):
    folder, _ = sharded(family)
    states = []
    for place in (folder, folders(family)):
        with opened(family, place).open("cpu") as loaded:
            states.append(loaded.module.state_dict())
    assert all(torch.equal(states[0][name], t) for name, t in states[1].items())


def without_a_shard(folder: Path, state: State) -> None:
    (folder / "b.safetensors").unlink()


def cut(folder: Path, state: State) -> None:
    (folder / "b.safetensors").write_bytes((folder / "b.safetensors").read_bytes()[:-4])


def emptier(folder: Path, state: State) -> None:
    part = load_file(folder / "b.safetensors")
    part.pop(next(iter(part)))
    save_file(part, folder / "b.safetensors", {"format": "pt"})


def fuller(folder: Path, state: State) -> None:
    save_file({**load_file(folder / "b.safetensors"), "x": torch.ones(1)}, folder / "b.safetensors", {"format": "pt"})


def twice(folder: Path, state: State) -> None:
    save_file({n: t + 1 for n, t in state.items()}, folder / "b.safetensors", {"format": "pt"})


def garbage(folder: Path, state: State) -> None:
    (folder / "model.safetensors.index.json").write_text("{")


def numbered(folder: Path, state: State) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": 5}}')


SHARDS = {
    without_a_shard: "lacks 'b.safetensors', which model.safetensors.index.json names",
    cut: r"b\.safetensors' is not a whole safetensors file",
    emptier: r"index\.json' names '.*', which no file holds",
    fuller: r"index\.json' does not name 'x', which its files hold",
    twice: r"holds '.*', … \(\d+ tensors\) in b\.safetensors and in another of its files",
    garbage: "is no index of weights",
    numbered: "is no index of weights",
}


@pytest.mark.parametrize("change", SHARDS)
@pytest.mark.parametrize("family", TWO)
def test_shards_that_are_not_what_the_index_says_are_one_line(family, change, sharded):
    folder, state = sharded(family)
    change(folder, state)
    with pytest.raises(UserError, match=SHARDS[change]) as error:
        opened(family, folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", TWO)
def test_of_two_sets_in_one_folder_the_single_file_counts(family, sharded):
    folder, state = sharded(family)
    single = {n: t + 1 if t.is_floating_point() else t for n, t in state.items()}
    save_file(single, folder / "model.safetensors", {"format": "pt"})
    with opened(family, folder).open("cpu") as loaded:
        has = loaded.module.state_dict()
    wrote = {n: t for n, t in network_of(family).state_dict().items() if t.is_floating_point()}
    assert all(torch.equal(has[name], tensor + 1) for name, tensor in wrote.items())


# Pickled files, and the packages that carry weights


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80\x02}q\x00", b"PK\x03\x04 cut"])
@pytest.mark.parametrize("family", ["timm_classifier", "edsr", "dcgan"])
def test_a_broken_pickle_is_one_line(family, content, tmp_path):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(UserError) as error:
        opened(family, tmp_path / "w.pth")
    assert "w.pth" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("averaged", ["state_dict_ema", "model_ema", "params_ema"])
def test_averaged_weights_go_before_those_of_the_last_step_and_wrappers_are_no_names(averaged, tmp_path, capsys):
    state = network_of("edsr").state_dict()
    means = {f"module._orig_mod.{name}": t + 1 for name, t in state.items()} | {"n_averaged": torch.tensor(5)}
    torch.save({"state_dict": state, averaged: means}, tmp_path / "w.pth")
    taken = read_state(str(tmp_path / "w.pth"))
    assert all(torch.equal(taken[name], t + 1) for name, t in state.items())
    assert taken.keys() == state.keys()
    assert f"the averaged weights, {averaged}, are taken" in " ".join(capsys.readouterr().err.split())


def test_a_pickled_module_is_refused_with_the_cure(tmp_path):
    torch.save(network_of("edsr"), tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"w\.pth' holds more than tensors, .*; save its state_dict\(\)$"):
        read_state(str(tmp_path / "w.pth"))


@pytest.mark.parametrize("word", ["gan-faces", "efficientnet-lite0"])
def test_a_broken_package_of_weights_is_one_line(word, tmp_path, monkeypatch):
    (tmp_path / "w.pth").write_bytes(b"cut")
    monkeypatch.setattr(dcgan, "carried", lambda *_: tmp_path / "w.pth")
    monkeypatch.setattr(lite0, "carried", lambda *_: tmp_path / "w.pth")
    family = {"gan-faces": "dcgan", "efficientnet-lite0": "timm_classifier"}[word]
    with pytest.raises(UserError, match=r"w\.pth' holds more than tensors, or is broken"):
        plugin.build({family: {"weights": word}}, "models").base(CPU)


# Stages


def test_a_stage_is_compared_like_a_base(changed):
    stage = opened("edsr", changed("edsr", lambda state: None))
    state = load_file(stage.weights / "model.safetensors")
    drop(state)
    save_file(state, stage.weights / "model.safetensors")
    with pytest.raises(UserError, match="lacks"):
        stage.model.open(stage, "cpu")


def test_shapes_that_are_no_json_are_one_line(folders, tmp_path):
    folder = Path(shutil.copytree(folders("edsr"), tmp_path / "m"))
    model: Any = plugin.build({"edsr": SMALL}, "models")
    for text in ("{", "[]", '{"head": 3}', '{"head": {"tensors": {"weight": 3}}}'):
        (folder / "shapes.json").write_text(text)
        with pytest.raises(UserError, match=r"shapes\.json"):
            model.open(Artifact(model, folder), "cpu")


@pytest.fixture(scope="module")
def graph(tmp_path_factory) -> Path:
    """The folder of an exported graph."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("graph")
    model = Heads(width=8)
    write_graph(export(model.network().eval(), model), folder / GRAPH)
    return folder


def in_xml(old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        text = (folder / exported.GRAPH).read_text()
        assert old in text
        (folder / exported.GRAPH).write_text(text.replace(old, new, 1))

    return change


def write(name: str, content: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content((folder / name).read_bytes())) and None


GRAPHS: dict[str, Callable[[Path], Any]] = {
    "no constants": lambda folder: (folder / "model.bin").unlink(),
    "no graph": lambda folder: (folder / "model.xml").unlink(),
    "constants cut": write("model.bin", lambda b: b[:-1]),
    "constants empty": write("model.bin", lambda b: b""),
    "constants of another": write("model.bin", lambda b: b + b"more"),
    "graph cut": write("model.xml", lambda b: b[: len(b) // 2]),
    "graph empty": write("model.xml", lambda b: b""),
    "garbage": write("model.xml", lambda b: b"\xff\xfe garbage"),
    "another xml": write("model.xml", lambda b: b"<a><b/></a>"),
    "a layer gone": in_xml('type="Convolution"', 'type="Convolutio"'),
    "a dtype": in_xml('element_type="f32"', 'element_type="f64"'),
    "not finite": write("model.bin", lambda b: b"\xff" * len(b)),
}


def graph_of(folder: Path) -> ExportedModule:
    check_graph(folder / GRAPH)
    return ExportedModule(folder)


@pytest.mark.parametrize("fault", GRAPHS)
def test_a_broken_graph_is_one_line(fault, graph, tmp_path):
    folder = Path(shutil.copytree(graph, tmp_path / "g"))
    GRAPHS[fault](folder)
    with pytest.raises(UserError) as error:
        graph_of(folder)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)


def test_a_whole_graph_is_opened(graph):
    assert graph_of(graph)(Heads().example(1))
