"""What others wrote is bounded before it is parsed: each fault is one `UserError` with file and place, at once."""

import json
import os
import re
import struct
import time
from contextlib import suppress

import pytest
import torch
import yaml
from safetensors.torch import save_file

from llmq import source
from llmq.data.file import File
from llmq.errors import LlmqError, UserError
from llmq.guarded import files, gguf_files, weights
from llmq.guarded.files import parse_json, read_json
from llmq.text.weights import check_folder

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.fixture(autouse=True)
def _at_once():
    began = time.perf_counter()
    yield
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (BOMB, "more than 20000 values once aliases"),
        ("steps:\n" + "- a\n" * 300_000, "1200007 characters"),
        ("steps:\n" + "- a\n" * 50_000, "more than 20000 values"),
        ("a: " + "[" * 5000, "r.yaml:1: nested deeper|r.yaml:1: not YAML: exceeded maximum nesting depth"),
        ("a: " + "{b: " * 5000, "r.yaml:1: nested deeper"),
        ("a: &a [*a]", "r.yaml:1: nested deeper"),
        ("x: 1\na: !!bool x", "r.yaml:2: 'x' cannot be read as 'tag:yaml.org,2002:bool'"),
        ("a: !!float x", "r.yaml:1: 'x' cannot be read"),
        ("a: !!int ''", "r.yaml:1: '' cannot be read"),
        ("a: !!binary x", "r.yaml:1: 'x' cannot be read"),
        ("a: !!python/name:os.system ''", "r.yaml:1: '' cannot be read"),
        ("a: !!set {b}", "r.yaml:1: 'tag:yaml.org,2002:set' is no plain list or mapping"),
        ("a: !!omap [b: 1]", "r.yaml:1: 'tag:yaml.org,2002:omap' is no plain"),
        ("a: !x [b]", "r.yaml:1: '!x' is no plain list or mapping"),
        ("? [a]\n: b", "r.yaml:1: a key is a word"),
        ("a: " + "9" * 5000, "r.yaml:1: a number of 5000 characters"),
        ("a: 1\n---\nb: 1", "r.yaml:2: not YAML"),
        ("a: \0", "r.yaml: not YAML|r.yaml:1: not YAML"),
    ],
)
def test_yaml_is_bounded_and_plain(tmp_path, monkeypatch, text, says):
    monkeypatch.chdir(tmp_path)
    with open("r.yaml", "w", encoding="utf-8") as stream:
        stream.write(text)
    with pytest.raises(UserError, match=says.replace("(", r"\(")):
        source.read(tmp_path.__class__("r.yaml"))


def test_plain_yaml_is_what_pyyaml_makes_of_it(tmp_path):
    text = "a: [1, 2.5, true, ~, x, '7', 0x1f]\nb: &b {c: 1.0e-3}\nd: *b\ne: |\n  two\n  lines\n"
    (tmp_path / "r.yaml").write_text(text)
    assert source.read(tmp_path / "r.yaml").data == yaml.safe_load(text)
    (tmp_path / "r.yaml").write_text("a: 1e-3")  # a text to PyYAML, and a number to everybody else
    assert source.read(tmp_path / "r.yaml").data == {"a": 0.001}
    assert source.value_of("[1, {a: no}]") == [1, {"a": False}]


@pytest.mark.parametrize("number", [".inf", "-.inf", ".nan", "1e999", "1.0e+999"])
def test_a_number_of_a_recipe_is_finite(number, tmp_path):
    (tmp_path / "r.yaml").write_text(f"a:\n- {number}")
    with pytest.raises(UserError, match=re.escape(f"r.yaml:2: {number!r} cannot be read as a finite number")):
        source.read(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * 5000, "too deep"),
        ("[" * 200 + "]" * 200, "deeper than 100"),
        ('{"a": ' * 101 + "1" + "}" * 101, "deeper than 100"),
        ('{"a": ' + "9" * 5000 + "}", "f.json: exceeds the limit"),
        ('{\n"a": }', "f.json:2: not JSON"),
        (b"\xff", "f.json:1: not UTF-8 text"),
    ],
)
def test_json_is_bounded(tmp_path, text, says):
    file = tmp_path / "f.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=says):
        read_json(file)


def test_json_of_a_hundred_levels_is_read(tmp_path):
    assert parse_json("[" * 100 + "]" * 100, "x")


def test_only_plain_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    for name, says in (("pipe", "is a pipe"), ("zero", "is a device"), ("", "is a folder"), ("loop", "cannot be read")):
        with pytest.raises(UserError, match=says):
            files.read_bytes(tmp_path / name)
    (tmp_path / "long").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="100 bytes, and 99 bytes is the most"):
        files.read_bytes(tmp_path / "long", 99)


def test_what_a_library_raises_names_the_file_and_what_the_machine_refuses_goes_on():
    class Panic(BaseException):
        """As PyO3's, which is no Exception."""

    for error in (KeyError("x"), Panic("y"), struct.error("z")):
        with pytest.raises(UserError, match="'f' is no whole thing"), files.library("f", "thing"):
            raise error
    refused = (MemoryError(), OSError(28, "full"), RuntimeError("std::bad_alloc"))
    for error in (*refused, LlmqError("x"), KeyboardInterrupt()):
        with pytest.raises(type(error)), files.library("f", "thing"):
            raise error


def header(told, data=b"\0\0\0\0"):
    text = told if isinstance(told, bytes) else json.dumps(told).encode()
    return len(text).to_bytes(8, "little") + text + data


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no header"),
        (b"\xff" * 8 + b"{}", "no header"),
        (header(b"[" * 5000), "not JSON"),
        (header([]), "no JSON object"),
        (header({"w": {}}), "no dtype, shape and place"),
        (header({"w": {**ONE, "shape": [-1]}}), "whole numbers"),
        (header({"w": {**ONE, "shape": [1.0]}}), "whole numbers"),
        (header({"w": {**ONE, "dtype": "F31"}}), "'F31', which is not known"),
        (header({"w": {**ONE, "shape": [2]}}), "does not have 4 bytes"),
        (header({"w": {**ONE, "shape": [2**62, 2**62]}}), "does not have 4 bytes"),
        (header({"w": {**ONE, "data_offsets": [4, 8]}}), "begins at byte 4"),
        (header({"w": ONE, "v": ONE}), "begins at byte 0"),
        (header({"w": ONE}, b"\0\0"), "promises"),
    ],
)
def test_headers_of_safetensors_are_checked(tmp_path, content, says):
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=says):
        weights.header(tmp_path / "w.safetensors")


def test_what_safetensors_wrote_is_read(tmp_path):
    tensors = {
        str(d).removeprefix("torch."): torch.zeros(3, 2).to(d)
        for d in (torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn)
    }
    save_file({**tensors, "none": torch.zeros(0, 4), "scalar": torch.zeros(())}, tmp_path / "w.safetensors")
    found = weights.header(tmp_path / "w.safetensors")
    assert {name: found[name].shape for name in ("float32", "none", "scalar")} == {
        "float32": (3, 2),
        "none": (0, 4),
        "scalar": (),
    }


def gguf(values=b"", count=0, tensors=b"", number=0, version=3):
    return b"GGUF" + struct.pack("<IQQ", version, number, count) + values + tensors


def named(name, kind, rest):
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + rest


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (gguf(version=9), "version 9"),
        (gguf(count=2**60), "promises 0 tensors and 1152921504606846976 values"),
        (gguf(named("a", 9, struct.pack("<IQ", 8, 2**60)), 1), "array of type 8 with 1152921504606846976 entries"),
        (gguf(named("a", 9, struct.pack("<IQ", 4, 2**60)), 1), "'?a'? goes past its end"),
        (gguf(named("a", 9, struct.pack("<IQ", 9, 3)), 1), "array of type 9"),
        (gguf(named("a", 77, b""), 1), "'a' is of type 77"),
        (gguf(named("general.alignment", 4, struct.pack("<I", 0)), 1), "general.alignment is 0"),
        (gguf(struct.pack("<Q", 2**63), 1), "9223372036854775808 bytes"),
        (gguf(named("a", 4, b"\0" * 4) * 2, 2), "'a' stands twice"),
        (gguf(tensors=named("t", 2, struct.pack("<QQIQ", 4, 4, 0, 0)), number=1), "goes past its end"),
        (gguf(tensors=named("t", 2, struct.pack("<QQIQ", 5, 4, 2, 0)), number=1), "whole blocks"),
    ],
)
def test_gguf_is_walked_through_in_bounded_steps(tmp_path, content, says):
    (tmp_path / "w.gguf").write_bytes(content)
    with pytest.raises(UserError, match=says):
        gguf_files.check(tmp_path / "w.gguf")


def test_what_the_gguf_library_wrote_is_whole(tmp_path):
    import numpy as np
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "w.gguf", "llama")
    writer.add_array("tokens", ["a", "ü"])
    writer.add_tensor("t", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert gguf_files.check(tmp_path / "w.gguf") == 128


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_hidden_layers": 10_000_000}, "num_hidden_layers is 10000000, and the files beside it hold 21 tensors"),
        ({"text_config": {"num_hidden_layers": 5000}}, "num_hidden_layers is 5000"),
        ({"hidden_size": 2**40}, "hidden_size is 1099511627776, and no network is so large"),
        ({"vocab_size": 10**300}, "vocab_size is a number of 301 digits"),
    ],
)
def test_a_configuration_asks_for_no_absurd_network(tiny_llama, tmp_path, changes, says):
    folder = copied(tiny_llama, tmp_path)
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**data, **changes}))
    for look in (check_folder, weights.check_folder, weights.read_configuration):
        with pytest.raises(UserError, match=says):
            look(folder)


def copied(folder, target):
    import shutil

    return shutil.copytree(folder, target / "m")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "generation_config.json"])
def test_a_pipe_among_the_files_of_a_model_does_not_hang(tiny_llama, tmp_path, name):
    folder = copied(tiny_llama, tmp_path)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(UserError, match=f"{name}' is a pipe"):
        weights.check_folder(folder)
    with pytest.raises(UserError):
        check_folder(folder)


def test_a_parquet_file_that_promises_more_than_it_has_is_refused(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"text": ["one", "two"] * 50}), tmp_path / "d.parquet")
    content = (tmp_path / "d.parquet").read_bytes()
    for place in range(len(content) - 60, len(content) - 4):
        (tmp_path / "e.parquet").write_bytes(content[:place] + b"\xff" + content[place + 1 :])
        with suppress(UserError):
            File(path=tmp_path / "e.parquet").read()
