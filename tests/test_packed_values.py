"""Packed layers whose values lie are refused before native code or an index sees them; none ends the process."""

import json
import os
import random
import shutil
import signal
from functools import partial

import pytest
import torch
from helpers import apply, base_of
from safetensors.torch import load_file, save_file

from llmq.errors import LlmqError, UserError
from llmq.guarded.weights import safetensors_of

LAYER = "model.layers.0.mlp.up_proj"
STATE = f"{LAYER}.weight.quant_state.bitsandbytes__nf4"
WHAT = {
    "nf4": ("quantize.bnb", {"bits": 4}),
    "int8": ("quantize.bnb", {"bits": 8}),
    "gptq": ("quantize.rtn", {"bits": 4, "group_size": 32}),
}


@pytest.fixture(scope="module")
def packed(tiny_llama, tmp_path_factory):
    """A packed folder of each kind."""
    base, home = base_of(tiny_llama), tmp_path_factory.mktemp("packed")
    return {kind: apply(word, base, home / kind, **settings) for kind, (word, settings) in WHAT.items()}


def changed(artifact, folder, change):
    """The artifact with other tensors."""
    from dataclasses import replace

    shutil.copytree(artifact.weights, folder)
    file = next(f for f in safetensors_of(folder) if any(name.startswith(LAYER) for name in load_file(f)))
    save_file(change(load_file(file)), file, {"format": "pt"})
    return replace(artifact, weights=folder)


def with_value(name, value, place=0):
    """One number of a tensor is another."""

    def change(tensors):
        made = tensors[name].clone()
        made.view(-1)[place] = value
        return {**tensors, name: made}

    return change


def with_state(**said):
    """What the layer says of itself is otherwise; what is None is not said."""

    def change(tensors):
        told = {**json.loads(bytes(tensors[STATE].tolist())), **said}
        text = json.dumps({k: v for k, v in told.items() if v is not None}).encode()
        return {**tensors, STATE: torch.tensor(list(text), dtype=torch.uint8)}

    return change


def as_tensor(name, tensor):
    return lambda tensors: {**tensors, name: tensor}


NAN, INF = float("nan"), float("inf")
CASES = [
    *[("nf4", with_value(f"{LAYER}.weight.quant_map", v), "outside of -1 to 1") for v in (NAN, INF, 2.0)],
    *[("nf4", with_value(f"{LAYER}.weight.nested_quant_map", v), "outside of -1 to 1") for v in (NAN, -3.0)],
    *[("nf4", with_value(f"{LAYER}.weight.nested_absmax", v), "that are no scales") for v in (NAN, INF, -1.0)],
    ("nf4", as_tensor(f"{LAYER}.weight.nested_quant_map", torch.zeros(0)), "needed F32 of 256"),
    ("nf4", as_tensor(f"{LAYER}.weight.nested_quant_map", torch.zeros(255)), "needed F32 of 256"),
    ("nf4", as_tensor(f"{LAYER}.weight.nested_quant_map", torch.zeros(256, dtype=torch.float16)), "needed F32 of 256"),
    ("nf4", as_tensor(f"{LAYER}.weight.nested_absmax", torch.zeros(0)), "nested_absmax is F32"),
    ("nf4", as_tensor(f"{LAYER}.weight.quant_map", torch.zeros(15)), "needed F32 of 16"),
    *[("nf4", with_state(**s), "describes") for s in ({"blocksize": 0}, {"blocksize": -64}, {"shape": [-1, -8192]})],
    *[("nf4", with_state(**s), "describes") for s in ({"shape": INF}, {"shape": "x"}, {"blocksize": None})],
    ("nf4", with_state(blocksize=2**70), "needed U8 of 1"),
    *[("nf4", with_state(quant_type=v), "says quant_type") for v in ("fp4", "int8", None, ["nf4"])],
    *[("nf4", with_state(dtype=v), "says dtype") for v in ("load", "int8", "", None, {})],
    *[("nf4", with_state(nested_dtype=v), "says nested_dtype") for v in ("hub", "int64", None)],
    *[("nf4", with_state(nested_offset=v), "says nested_offset") for v in (NAN, INF, "1", None, 1e40)],
    *[("int8", with_value(f"{LAYER}.SCB", v), "that are no scales") for v in (NAN, INF, -1.0)],
    *[("gptq", with_value(f"{LAYER}.scales", v), "not finite") for v in (NAN, INF)],
    *[("gptq", with_value(f"{LAYER}.g_idx", v), r"groups outside of 0 to 1") for v in (-1, 2, 2**31 - 1)],
]


@pytest.mark.parametrize(("kind", "change", "says"), CASES)
def test_values_that_lie_are_named_before_anything_trusts_them(packed, tmp_path, kind, change, says):
    with pytest.raises(UserError, match=says) as caught, changed(packed[kind], tmp_path / "x", change).open("cpu"):
        pass
    assert LAYER in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", WHAT)
def test_what_was_packed_here_opens(packed, kind):
    with packed[kind].open("cpu") as loaded:
        assert loaded.module(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def mutate(tensors, dice):
    """Some part of a packed layer, changed in one of many ways."""
    names = [n for n in tensors if LAYER in n]
    name = dice.choice(names)
    made = tensors[name]
    flat = made.reshape(-1)
    noise = torch.frombuffer(bytearray(dice.randbytes(flat.nbytes)), dtype=made.dtype).view(made.shape)
    others = [torch.uint8, torch.int8, torch.int32, torch.float16, torch.float32, torch.int64]
    ways = [
        lambda: flat[: dice.randrange(len(flat) + 1)].clone(),
        lambda: torch.cat([flat, flat[: dice.randrange(1, 9)]]),
        lambda: made.to(dice.choice(others)),
        lambda: noise,
        lambda: made.t().contiguous() if made.dim() == 2 else made[None],
        lambda: torch.full_like(made, dice.choice([0, 1, 127])),
    ]
    return {**tensors, name: dice.choice(ways)()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", WHAT)
def test_no_mutated_layer_ends_the_process_or_hangs(packed, tmp_path, kind):
    ended: dict[str, int] = {}
    for seed in range(60):
        child = os.fork()
        if not child:  # a warmed child: what it does wrong ends it alone
            signal.alarm(30)
            torch.set_num_threads(1)
            change = partial(mutate, dice=random.Random(seed))
            try:
                with changed(packed[kind], tmp_path / f"{kind}{seed}", change).open("cpu") as loaded:
                    loaded.module(torch.tensor([[1, 2, 3]]))
                os._exit(0)
            except LlmqError:
                os._exit(3)
            except BaseException as error:  # noqa: BLE001
                print(seed, repr(error)[:300], flush=True)
                os._exit(4)
        _, status = os.waitpid(child, 0)
        shutil.rmtree(tmp_path / f"{kind}{seed}", ignore_errors=True)
        how = {0: "opened", 3: "refused"}.get(os.waitstatus_to_exitcode(status), f"seed {seed}: {status}")
        ended[how] = ended.get(how, 0) + 1
    print(ended)
    assert ended.keys() <= {"opened", "refused"}, ended
    assert ended["refused"] > 20
