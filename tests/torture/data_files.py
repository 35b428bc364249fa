"""Files of rows and images that were damaged: `llmq check --data`, which reads all of them."""

import functools
import io
import json
import multiprocessing
import random
import shutil
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from torture import child, mutate
from torture.checkpoints import templates
from torture.checkpoints import whole as whole_model
from torture.child import command, judge

COMMAND = ("check", "r.yaml", "--data")
READ = 98
"""The exit code of a child that has read its data: what follows needs the libraries."""
ROWS = [
    {"prompt": f'say "{i}",\nplease', "completion": f"ünïcode {i}", "extra": [{"b": i}, {"a": None}]} for i in range(8)
]
TALKS = [
    {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a", "weight": 1}]}
    for i in range(6)
]
TEXT = "model: {causal_lm: {weights: m}}\nsteps:\n- adapt.lora: {data: PATH, max_length: 32}\nevaluate: []\n"
IMAGES = "model: {dcgan: {features: 4}}\nsteps:\n- adapt.train: {data: PATH, held_out_examples: 0}\nevaluate: []\n"
ROCK = (
    "model: {srcnn: {}}\nsteps:\n"
    "- adapt.train: {data: {rock: {path: PATH, window: [0, 255]}}, crop: 8, held_out_examples: 0}\nevaluate: []\n"
)


def _csv() -> bytes:
    rows = [(r["prompt"].replace('"', '""'), r["completion"]) for r in ROWS]  # type: ignore[attr-defined]
    return ("prompt,completion\n" + "".join(f'"{p}",{c}\n' for p, c in rows)).encode()


def _jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _parquet(rows: list[Any], **how: Any) -> bytes:
    import pyarrow
    from pyarrow import parquet

    stream = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), stream, **how)
    return stream.getvalue()


def _picture(kind: str, mode: str = "RGB") -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    picture = Image.linear_gradient("L").resize((64, 64)).convert(mode)
    picture.save(stream, kind)
    return stream.getvalue()


def _volume(kind: str) -> bytes:
    import numpy as np

    stream = io.BytesIO()
    volume = np.arange(4 * 32 * 128, dtype=np.uint32).reshape(4, 32, 128).astype(np.uint8)
    if kind == "npz":
        np.savez_compressed(stream, high=volume)
    elif kind == "tif":
        import tifffile

        tifffile.imwrite(stream, volume)
    elif kind == "dcm":
        return _dicom(volume)
    else:
        from scipy.io import netcdf_file

        with netcdf_file(stream, "w") as file:
            for name, n in zip("zyx", volume.shape, strict=True):
                file.createDimension(name, n)
            file.createVariable("high", "i1", ("z", "y", "x"))[:] = volume
            file.flush()
            return stream.getvalue()
    return stream.getvalue()


def _dicom(volume: Any) -> bytes:
    import pydicom
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

    held = pydicom.Dataset()
    held.file_meta = pydicom.dataset.FileMetaDataset()
    held.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    held.SOPClassUID = held.file_meta.MediaStorageSOPClassUID = CTImageStorage
    held.SOPInstanceUID = held.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    held.NumberOfFrames, held.Rows, held.Columns = volume.shape
    held.SamplesPerPixel, held.PhotometricInterpretation, held.PixelRepresentation = 1, "MONOCHROME2", 0
    held.BitsAllocated, held.BitsStored, held.HighBit = 8, 8, 7
    held.RescaleSlope, held.RescaleIntercept, held.PixelSpacing = 1, -10, [0.01, 0.01]
    held.PixelData = volume.tobytes()
    stream = io.BytesIO()
    held.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


WHOLE: dict[str, tuple[str, Callable[[], bytes]]] = {
    "d.csv": (TEXT, _csv),
    "d.txt": (TEXT, lambda: "Ünï one.\n\nTwo.\r\nThree.\n".encode() * 9),
    "rows.jsonl": (TEXT, lambda: _jsonl(ROWS)),
    "talks.jsonl": (TEXT, lambda: _jsonl(TALKS)),
    "rows.json": (TEXT, lambda: json.dumps(ROWS).encode()),
    "talks.json": (TEXT, lambda: json.dumps(TALKS).encode()),
    "rows.parquet": (TEXT, lambda: _parquet(ROWS)),
    "talks.parquet": (TEXT, lambda: _parquet(TALKS * 20)),
    "zstd.parquet": (TEXT, lambda: _parquet(TALKS * 20, compression="zstd", data_page_version="2.0")),
    "plain.parquet": (TEXT, lambda: _parquet([{"text": "x" * i} for i in range(1, 90)], use_dictionary=False)),
    "i/a/x.png": (IMAGES, lambda: _picture("PNG")),
    "i/a/x.jpg": (IMAGES, lambda: _picture("JPEG")),
    "i/a/x.gif": (IMAGES, lambda: _picture("GIF", "P")),
    "i/a/x.tif": (IMAGES, lambda: _picture("TIFF")),
    "i/a/x.webp": (IMAGES, lambda: _picture("WEBP")),
    "i/a/x.bmp": (IMAGES, lambda: _picture("BMP", "1")),
    "v.npz": (ROCK, lambda: _volume("npz")),
    "v.tif": (ROCK, lambda: _volume("tif")),
    "v.nc": (ROCK, lambda: _volume("nc")),
    "v.dcm": (ROCK, lambda: _volume("dcm")),
}
PARQUETS = [name for name in WHOLE if name.endswith(".parquet")]


@functools.cache
def _with_libraries() -> Connection:
    """A process that has imported all libraries, and made the model. A child of this one costs a quarter of its."""
    here, there = multiprocessing.Pipe()
    templates()

    def serve() -> None:
        child.warm()
        there.send(whole_model("llama"))
        while True:
            there.send(command(COMMAND, there.recv()))

    multiprocessing.get_context("fork").Process(target=serve, daemon=True).start()
    return here


@functools.cache
def _model() -> Path:
    return _with_libraries().recv()


def warm() -> None:
    """Import what `llmq check` needs, beside a process with all libraries."""
    _model()
    child.warm_words()


def _only_read() -> None:
    """The command ends once it has read its data."""
    from llmq import environment

    environment.prepare = lambda *given: sys.exit(READ)


@functools.cache
def whole(name: str) -> bytes:
    """A file that nothing is wrong with."""
    return WHOLE[name][1]()


def once(seed: int, folder: Path) -> str:
    """One data file, read as the command does."""
    dice = random.Random(f"data {seed}")
    name = dice.choice(PARQUETS if dice.random() < 0.3 else list(WHOLE))
    recipe, content = WHOLE[name][0], whole(name)
    changed = mutate.of_flips(content, dice, 400) if dice.random() < 0.6 else mutate.of_bytes(content, dice)
    if name.endswith(".json") and dice.random() < 0.5:
        changed = mutate.of_json(content, dice)
    if name.endswith("l") and dice.random() < 0.5:
        lines = content.splitlines()
        place = dice.randrange(len(lines))
        changed = b"\n".join([*lines[:place], mutate.of_json(lines[place], dice), *lines[place + 1 :], b""])
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(changed)
    if name.startswith("i/"):
        (folder / "i" / "a" / "whole.png").write_bytes(whole("i/a/x.png"))
    if dice.random() < 0.04:
        mutate.of_file(file, dice)
    if recipe is TEXT:
        shutil.copytree(_model(), folder / "m")
    (folder / "r.yaml").write_text(recipe.replace("PATH", "i" if name.startswith("i/") else name))
    ended = command(COMMAND, folder, _only_read)
    if ended.code == READ:
        _with_libraries().send(folder)
        ended = _with_libraries().recv()
    return judge(ended, seed)
