"""The GPTQ format across houses: what llmq writes GPTQModel and transformers open, what others wrote llmq opens.

Those marked slow need `LLMQ_GPTQMODEL_PYTHON`, a Python interpreter that has gptqmodel, and a minute for its compiler.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import apply, base_of, logits_of, reshaped, some_ids
from safetensors.torch import load_file, save_file

from llmq.errors import UserError
from llmq.files import write_json

IDS = some_ids()
PYTHON = os.environ.get("LLMQ_GPTQMODEL_PYTHON", "")
with_gptqmodel = pytest.mark.skipif(
    not PYTHON, reason="LLMQ_GPTQMODEL_PYTHON names no Python interpreter that has gptqmodel"
)
OTHER = """
import json, sys
sys.stdout, out = sys.stderr, sys.stdout
import torch
torch.set_num_threads(2)
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GPTQConfig

def quantize(folder, settings):
    config = QuantizeConfig(**settings, offload_to_disk=False)
    model = GPTQModel.load(jobs["model"], config, device="cpu", dtype=torch.float32)
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in jobs["rows"]]
    model.quantize(rows, batch_size=4, calibration_data_min_length=1)
    model.save(folder)

def gptqmodel(folder):
    return GPTQModel.load(folder, device="cpu", backend=BACKEND.TORCH, dtype=torch.bfloat16).model

def transformers(folder):
    plain = {"quantization_config": GPTQConfig(bits=4, backend="torch")}  # all but the backend is the folder's own
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu", **plain)

jobs, logits, failed = json.load(open(sys.argv[1])), {}, {}
for name, (folder, settings) in jobs["quantize"].items():
    try:
        quantize(folder, settings)
    except Exception as error:
        failed[name] = repr(error)
for name, (folder, via) in jobs["open"].items():
    try:
        with torch.inference_mode():
            made = globals()[via](folder).eval()(input_ids=torch.tensor(jobs["ids"])).logits
        logits[name] = made.float().contiguous()
    except Exception as error:
        failed[name] = repr(error)
save_file(logits, sys.argv[2])
print(json.dumps(failed), file=out)
"""


Answers = dict[str, torch.Tensor | str]


def elsewhere(folder: Path, **jobs: Any) -> Answers:
    """What the interpreter with gptqmodel makes of some jobs: the logits of each model to open, or what went wrong."""
    (folder / "jobs.json").write_text(json.dumps({"quantize": {}, "ids": IDS.tolist(), **jobs}))
    settings = {"GPTQMODEL_CPU_WORKERS": "2", "OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    command = [PYTHON, "-c", OTHER, "jobs.json", "logits.safetensors"]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **settings}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {**load_file(folder / "logits.safetensors"), **json.loads(done.stdout.splitlines()[-1])}


def ours(folder: Path, dtype: str = "float32") -> torch.Tensor:
    """The logits of a folder as llmq opens it."""
    stage = base_of(folder, dtype)
    assert stage.packed
    return logits_of(stage.model.open(stage, "cpu").module, IDS).float()


def assert_same(theirs: Answers, name: str, folder: Path) -> None:
    """Their logits are ours: in float32 but for their kernel's float16, in bfloat16 but for its rounding."""
    assert name not in theirs, theirs[name]
    exact = ours(folder)
    for via, most, mean in (("transformers", 0.01, 0.001), ("gptqmodel", 0.1, 0.01)):
        logits = theirs.get(f"{name} by {via}")
        if logits is not None:
            assert isinstance(logits, torch.Tensor), logits
            difference = (logits - exact).abs() / exact.std()
            print(f"{name} by {via}: {difference.max():.1e} standard deviations at most, {difference.mean():.1e} mean")
            assert difference.max() < most
            assert difference.mean() < mean


WHAT_TRANSFORMERS_LACKS = ("layers differ", "head", "head differs")
"""It reads neither `dynamic` nor `lm_head`, whoever wrote them; GPTQModel does."""


def both_ways(folders: dict[str, Path]) -> dict[str, tuple[str, str]]:
    """Each folder to be opened by GPTQModel, and by plain transformers where it can."""
    ways = [(name, folder, via) for name, folder in folders.items() for via in ("transformers", "gptqmodel")]
    return {
        f"{name} by {via}": (str(folder), via)
        for name, folder, via in ways
        if via == "gptqmodel" or name not in WHAT_TRANSFORMERS_LACKS
    }


@pytest.fixture(scope="module")
def model(tiny_llama, tmp_path_factory) -> Path:
    """A random bfloat16 Llama of 2 blocks and 128 columns."""
    folder = tmp_path_factory.mktemp("interop") / "model"
    return reshaped(tiny_llama, folder, hidden_size=128, intermediate_size=256, head_dim=32)


WRITTEN: dict[str, dict[str, Any]] = {
    "4 bits": {},
    "asymmetric": {"sym": False},
    "2 bits": {"bits": 2, "sym": True},
    "3 bits": {"bits": 3, "sym": True},
    "3 bits, asymmetric": {"bits": 3, "sym": False},
    "8 bits": {"bits": 8},
    "by activation": {"desc_act": True, "static_groups": False},
    "by activation, static groups": {"desc_act": True, "static_groups": True},
    "whole rows": {"group_size": -1},
    "layers differ": {"modules": {"layers.0.self": "skip", "down_proj": {"bits": 8}, "q_proj": {"group_size": 128}}},
    "head": {"modules": {"lm_head": {}}},
    "head differs": {"modules": {"lm_head": {"bits": 8}}},
}


@pytest.fixture(scope="module")
def written(model) -> dict[str, Path]:
    """What llmq writes."""
    few = {"group_size": 32, "samples": 8, "length": 64}
    return {
        name: apply("quantize.gptq", base_of(model), model.parent / name, **{**few, **settings}).weights
        for name, settings in WRITTEN.items()
    }


@pytest.fixture(scope="module")
def of_written(written, model) -> Answers:
    """What the others make of that."""
    return elsewhere(model.parent, open=both_ways(written))


@pytest.mark.slow
@with_gptqmodel
@pytest.mark.parametrize("name", WRITTEN)
def test_what_llmq_writes_the_others_open(name, of_written, written):
    assert_same(of_written, name, written[name])


TAKEN: dict[str, dict[str, Any]] = {
    "4 bits": {},
    "asymmetric": {"sym": False},
    "by activation": {"desc_act": True, "act_group_aware": False},
    "2 bits": {"bits": 2, "sym": True},
    "3 bits": {"bits": 3, "sym": True},
    "3 bits, asymmetric": {"bits": 3, "sym": False},
    "8 bits": {"bits": 8},
    "8 bits, asymmetric": {"bits": 8, "sym": False},
    "whole rows": {"group_size": -1, "act_group_aware": False},
    "gptq_v2": {"format": "gptq_v2"},
    "gptq_v2, asymmetric": {"format": "gptq_v2", "sym": False},
    "gptq_v2, 3 bits": {"format": "gptq_v2", "bits": 3, "sym": False},
    "layers differ": {"dynamic": {r"+:.*down_proj": {"bits": 8}, r"-:.*layers\.0\.self.*": {}}},
    "head": {"lm_head": True},
}


@pytest.fixture(scope="module")
def taken(model) -> dict[str, Path]:
    """Where GPTQModel writes to."""
    return {name: model.parent / f"gptqmodel {name}" for name in TAKEN}


@pytest.fixture(scope="module")
def of_taken(model, taken) -> Answers:
    """What the others make of what GPTQModel writes."""
    rows = torch.randint(3, 400, (8, 64), generator=torch.Generator().manual_seed(2)).tolist()
    jobs = {name: (str(folder), {"bits": 4, "group_size": 32, **TAKEN[name]}) for name, folder in taken.items()}
    return elsewhere(model.parent, model=str(model), rows=rows, quantize=jobs, open=both_ways(taken))


@pytest.mark.slow
@with_gptqmodel
@pytest.mark.parametrize("name", TAKEN)
def test_what_gptqmodel_writes_llmq_opens(name, of_taken, taken):
    assert_same(of_taken, name, taken[name])


def words(codes: np.ndarray, bits: int) -> torch.Tensor:
    """Codes `[rows, n]` as a stream of bits along each row, in int32 words."""
    stream = codes[..., None] >> np.arange(bits) & 1
    return torch.from_numpy(np.packbits(stream.reshape(len(codes), -1), axis=-1, bitorder="little").view(np.int32))


def of_autogptq(model: Path, folder: Path, bits: int, sym: bool, desc_act: bool) -> torch.Tensor:
    """A folder as AutoGPTQ wrote them in 2023, filled at random; the logits that it stands for."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float16)
    state, dice = module.state_dict(), np.random.default_rng(0)
    for name, layer in module.model.layers.named_modules(prefix="model.layers"):
        if isinstance(layer, torch.nn.Linear):
            del state[f"{name}.weight"]
            tensors, layer.weight.data = random_layer(*layer.weight.shape, bits, sym, desc_act, dice)
            state |= {f"{name}.{part}": tensor for part, tensor in tensors.items()}
    settings = {"bits": bits, "group_size": 32, "damp_percent": 0.01, "desc_act": desc_act, "sym": sym}
    settings |= {"true_sequential": True, "model_name_or_path": None, "model_file_base_name": "model"}
    config = json.loads((model / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype").replace("bfloat16", "float16")
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    write_json(folder / "quantize_config.json", settings)
    write_json(folder / "config.json", {**config, "quantization_config": {**settings, "quant_method": "gptq"}})
    return logits_of(module.float().eval(), IDS)


def random_layer(
    outputs: int, inputs: int, bits: int, sym: bool, desc_act: bool, dice: np.random.Generator
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors of a layer in AutoGPTQ's time, a bias of zeros among them, and the weight that they stand for."""
    shape = inputs // 32, outputs
    codes = dice.integers(0, 2**bits, (outputs, inputs))
    # Not 0: that was written as -1, over its neighbours, and nobody could read it.
    zeros = np.full(shape, 2 ** (bits - 1)) if sym else dice.integers(1, 2**bits, shape)
    scales = torch.from_numpy(dice.uniform(0.05, 0.1, shape) / 2**bits).half()
    g_idx = np.arange(inputs) // 32
    if desc_act:
        dice.shuffle(g_idx)
    tensors = {
        "qweight": words(codes, bits).t().contiguous(),
        "qzeros": words(zeros - 1, bits),
        "scales": scales,
        "g_idx": torch.from_numpy(g_idx).int(),
        "bias": torch.zeros(outputs, dtype=torch.float16),
    }
    return tensors, torch.from_numpy(codes - zeros[g_idx].T) * scales[g_idx].t().float()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("sym", "desc_act"), [(True, False), (False, True)])
def test_what_autogptq_wrote_llmq_opens(bits, sym, desc_act, model, tmp_path):
    exact = of_autogptq(model, tmp_path / "old", bits, sym, desc_act)
    assert torch.allclose(ours(tmp_path / "old"), exact, rtol=0, atol=1e-5)
    assert (ours(tmp_path / "old", "bfloat16") - exact).std() < 0.02 * exact.std()


def test_a_format_that_is_not_read_here_is_refused(model, tmp_path):
    of_autogptq(model, tmp_path / "old", 4, True, False)
    file = tmp_path / "old" / "config.json"
    file.write_text(file.read_text().replace('"quant_method"', '"checkpoint_format": "marlin", "quant_method"'))
    with pytest.raises(UserError, match="'marlin'; llmq opens gptq and gptq_v2"):
        ours(tmp_path / "old")
