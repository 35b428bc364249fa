"""What only a card can show, in the order in which half an hour on one settles most: `pytest -m gpu tests/test_gpu.py`.

`LLMQ_TEST_DEVICE=cpu` runs the tests themselves on a processor, where all but those of its memory must pass as well.
"""

import gc
import os

import pytest
import torch
from helpers import base_of, logits_of, some_ids
from torch.nn.functional import linear

import llmq
from llmq import environment, plugin
from llmq.types import Context

DEVICE = os.environ.get("LLMQ_TEST_DEVICE", "cuda:0")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE != "cpu" and not torch.cuda.is_available(), reason="PyTorch sees no card"),
]
on_card = pytest.mark.skipif(DEVICE == "cpu", reason="counts the bytes of a card")

NEAR = 0.05
"""The greatest distance of two outputs, relative to their norm: bfloat16 sums in another order."""
PACKINGS = {
    "float": [],
    "nf4": [{"quantize.bnb": {"bits": 4}}],
    "int8": [{"quantize.bnb": {"bits": 8}}],
    "gptq": [{"quantize.gptq": {"bits": 4, "group_size": 32, "samples": 4, "length": 64}}],
}


def made(steps, artifact, folder, device=DEVICE):
    """What some steps make of an artifact on a device."""
    for i, entry in enumerate(steps):
        step = plugin.build(entry)
        (folder / str(i)).mkdir(parents=True)
        artifact = step.apply(artifact, folder / str(i), Context(device, 0))
    return artifact


def apart(one, other):
    one, other = one.float().cpu(), other.float().cpu()
    return float((one - other).norm() / other.norm())


def answers(stage, device):
    with stage.open(device) as loaded:
        return logits_of(loaded.module, some_ids().to(device)).float().cpu()


def test_the_quickstart_runs(tmp_path):
    report = llmq.run("text/quickstart", {"device": DEVICE, "adapt.lora.max_steps": 4}, out=tmp_path / "run")
    assert not report.failures
    assert report.environment["device"] == DEVICE
    assert report.environment["accelerator"] or DEVICE == "cpu"


@pytest.mark.parametrize("word", ["quantize.rtn", "quantize.gptq", "prune.sparsegpt", "prune.wanda"])
def test_a_compression_gives_what_the_processor_gives_and_goes_on_after_a_kill(
    word, tiny_llama, tiny_jsonl, tmp_path, monkeypatch
):
    from llmq.text import blockwise

    windows = {"data": str(tiny_jsonl), "samples": 4, "length": 64}
    grid = {"bits": 4, "group_size": 32}
    settings = {"quantize.rtn": grid, "quantize.gptq": {**grid, **windows}}.get(word, {"sparsity": 0.5, **windows})
    base = base_of(tiny_llama, "float32")
    here = made([{word: settings}], base, tmp_path / "cpu", "cpu")
    there = made([{word: settings}], base, tmp_path / "card")
    assert apart(answers(there, "cpu"), answers(here, "cpu")) < NEAR
    stock, calls = blockwise.write, []

    def dying(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        stock(*args)

    folder, step = tmp_path / "killed", plugin.build({word: settings})
    folder.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(blockwise, "write", dying)
        with pytest.raises(KeyboardInterrupt):
            step.apply(base, folder, Context(DEVICE, 0))
    again = step.apply(base, folder, Context(DEVICE, 0))
    assert apart(answers(again, DEVICE), answers(there, DEVICE)) < NEAR


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_packed_layer_multiplies_and_passes_gradients_as_the_dense_one(bits):
    from llmq.matrix.gptq_format import to_tensors
    from llmq.matrix.grid import round_to_nearest
    from llmq.matrix.packed_linear import PackedLinear

    quantized = round_to_nearest(torch.randn(192, 256, generator=torch.Generator().manual_seed(0)), bits, 64, False)
    layer = PackedLinear(256, 192, False, bits, 4, "gptq", torch.bfloat16)
    layer.load_state_dict(to_tensors(quantized))
    layer = layer.to(DEVICE)
    layer.prepare()
    dense = quantized.weight().to(DEVICE, torch.bfloat16)
    for rows in (1, 7, 300):
        inputs = torch.randn(rows, 256).to(DEVICE, torch.bfloat16)
        assert apart(layer(inputs), linear(inputs, dense)) < NEAR
        mine, its = inputs.clone().requires_grad_(), inputs.clone().requires_grad_()
        layer(mine).float().square().sum().backward()
        linear(its, dense).float().square().sum().backward()
        assert apart(mine.grad, its.grad) < NEAR


@pytest.mark.parametrize("packing", PACKINGS)
def test_scores_and_texts_are_those_of_the_processor(packing, tiny_llama, tmp_path):
    from llmq.text.decoding import Job, generate
    from llmq.text.scoring import Request, score

    stage = made(PACKINGS[packing], base_of(tiny_llama), tmp_path, "cpu")
    requests = [Request(tuple(row), 5) for row in some_ids(6, 24).tolist()]
    told, written = {}, {}
    for device in ("cpu", DEVICE):
        with stage.open(device) as loaded:
            told[device] = torch.tensor([s for s, _ in score(loaded.module, requests, device)])
            jobs = [Job(tuple(row), (), 8) for row in some_ids(5, 9).tolist()]
            written[device] = generate(loaded.module, loaded.processor, jobs, device)
    assert apart(told[DEVICE], told["cpu"]) < NEAR
    assert len(written[DEVICE]) == len(written["cpu"]) == 5  # ties of random weights may fall either way
    assert all(written[DEVICE])


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_model_is_tuned_and_merged_and_nothing_stays_on_the_card(packing, tiny_llama, tiny_jsonl, tmp_path):
    lora = {"data": str(tiny_jsonl), "r": 4, "max_length": 64, "max_steps": 2}
    stage = base_of(tiny_llama)
    for i, step in enumerate([*PACKINGS[packing], {"adapt.lora": lora}, {"adapt.merge": {"window": 32, "tokens": 64}}]):
        stage = made([step], stage, tmp_path / str(i))
        gc.collect()
        if DEVICE != "cpu":
            assert torch.cuda.memory_allocated(DEVICE) < 2**20
    assert stage.measurements[0].value < 0.1


def test_an_int8_recipe_of_images_runs(tmp_path):
    report = llmq.run("vision/classifier-int8", {"device": DEVICE}, out=tmp_path / "run")
    assert not report.failures


@on_card
def test_stages_that_a_card_has_no_room_for_at_once_are_timed_all_the_same(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "free_memory", lambda device: 0)
    plain = {
        "model": {"causal_lm": {"weights": str(tiny_llama)}},
        "steps": [{"quantize.bnb": {"bits": 4}}],
        "evaluate": [{"speed": {"prompt_tokens": 8, "new_tokens": 4, "rounds": 3}}],
        "device": DEVICE,
    }
    report = llmq.run(plain, out=tmp_path / "run", force=True)
    assert not report.failures
    assert all("visits" in m["convention"] for m in report.measurements if "per_second" in m["metric"])


@on_card
def test_a_card_that_runs_out_is_one_line_and_the_report_is_there(tiny_llama, tmp_path):
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-4, DEVICE)
    try:
        with pytest.raises(Exception, match="out of memory") as failed:
            torch.empty(2**30, device=DEVICE)
        from llmq.errors import exit_code, line_of

        assert "the card has" in line_of(failed.value)
        assert exit_code(failed.value) == 4
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "nf4"])
@pytest.mark.parametrize("tokens", [512, 2048, 4096])
def test_the_fast_path_gives_the_loss_and_the_gradients_of_the_stock_one(dtype, tokens, tiny_llama, tmp_path):
    from llmq.text.examples import Collator, Tokens
    from llmq.text.fast_path import FastPath

    stage = base_of(tiny_llama, "bfloat16" if dtype == "nf4" else dtype)
    stage = made(PACKINGS["nf4"], stage, tmp_path) if dtype == "nf4" else stage
    lora = plugin.build({"adapt.lora": {"data": "pydoc", "r": 4}})
    with stage.open(DEVICE) as loaded:
        loaded.module.config.use_cache = False
        torch.manual_seed(0)
        model = lora._with_adapter(loaded)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zeros at first, and then no gradient of A
                torch.nn.init.normal_(parameter, std=0.02)
        fast = FastPath(model)
        row = [Tokens(tuple(ids), (True,) * len(ids)) for ids in some_ids(4, tokens // 4).tolist()]
        batch = Collator(0)([row])
        segments, _ = batch.pop("segments"), batch.pop("tokens")
        batch = {name: tensor.to(DEVICE) for name, tensor in batch.items()}
        losses, gradients = [], []
        for switched in (False, True):
            fast.segments = segments
            model.zero_grad()
            with torch.autocast(DEVICE.split(":")[0], torch.bfloat16 if dtype == "nf4" else getattr(torch, dtype)):
                if switched:
                    with fast.switched_on():
                        loss = model(**batch).loss
                        loss.backward()
                else:
                    loss = model(**batch).loss
                    loss.backward()
            losses.append(loss.detach())
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert apart(losses[1], losses[0]) < 0.01
    assert apart(gradients[1], gradients[0]) < 2 * NEAR


@pytest.mark.parametrize(
    "recipe", ["rock-srcnn", "rock-edsr", "rock-wdsr", "rock-srresnet", "digits-prune-int8", "gan-prune"]
)
def test_two_steps_of_every_trainer_of_images_and_a_resumed_one(recipe, tmp_path, monkeypatch):
    from llmq import api
    from llmq.vision import loop

    job = api.load(f"vision/{recipe}")
    trained = [name for name, step in zip(job.stage_names[1:], job.steps, strict=True) if hasattr(step, "max_steps")]
    short = {f"{name}.{key}": value for name in trained for key, value in (("max_steps", 2), ("save_steps", 1))}
    job = api.load(f"vision/{recipe}", {**short, "device": DEVICE, "evaluate": ["size"], "gate": []})
    stock = loop.Run.step

    def dying(self, examples, step):
        if step == 1:
            raise KeyboardInterrupt
        return stock(self, examples, step)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "step", dying)
        with pytest.raises(KeyboardInterrupt):
            llmq.run(job, out=tmp_path / "run", force=True)
    assert not llmq.run(job, out=tmp_path / "run", resume=True, force=True).failures
