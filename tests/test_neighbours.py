"""No example of a batch reaches another while a model trains: the model is asked, whatever it is called."""

from contextlib import nullcontext

import pytest
import torch
from helpers import apply, base_of, some_ids
from tiny_text_models import ARCHITECTURES, SHAPE

from llmq.errors import LlmqError, UserError
from llmq.text.fast_path import FastPath, choose

LENGTH = 12
# Whose packed examples reach one another, by transformers' own code: a state, a convolution, or a mask without
# positions runs through the row. Found by the oracle below, which knows nothing of llmq.
APART = ("llama", "gemma3_text", "qwen3", "gpt2", "phi3", "opt")
LEAKING = ("granitemoehybrid", "bamba", "lfm2", "recurrent_gemma", "jamba", "bloom")
MAMBAS = ("mamba", "mamba2")


def tiny(name, dtype=torch.float32):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(name, vocab_size=400, **{**SHAPE, **ARCHITECTURES[name]})
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    model.config.use_cache = False
    return model


def adapted(model, targets="all-linear", dropout=0.0):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(target_modules=targets, task_type="CAUSAL_LM", lora_dropout=dropout))


def moves_by_hand(model):
    """How far the second of two packed examples moves when the first is another, by nothing but its forward."""
    one, other, second = some_ids(3, LENGTH)
    positions = torch.arange(LENGTH).repeat(2)[None]
    model.eval()
    with torch.no_grad():
        made = [
            model(input_ids=torch.cat([first, second])[None], position_ids=positions).logits[0, LENGTH:]
            for first in (one, other)
        ]
    return float((made[0] - made[1]).abs().max())


@pytest.mark.parametrize("name", [*APART, *LEAKING, *MAMBAS])
def test_packing_is_on_exactly_where_the_second_example_does_not_move(name):
    targets = ["in_proj", "x_proj", "dt_proj"] if name == "mamba" else ["in_proj"] if name in MAMBAS else "all-linear"
    model = adapted(tiny(name), targets)
    way = choose(model, True, 2)
    with way.fast.switched_on() if way.fast else torch.enable_grad():
        if way.fast:
            way.fast.see(torch.arange(LENGTH).repeat(2)[None])
        moved = moves_by_hand(model)  # of hidden states in the fast path, of logits elsewhere
    assert way.packing == (moved == 0) == (name in APART)
    assert bool(way.why_unpacked) == (name not in APART)


def test_a_leak_smaller_than_any_tolerance_is_seen_in_bfloat16_too():
    """LFM2's convolution of three tokens moves the logits by half a thousandth."""
    for dtype in (torch.float32, torch.bfloat16):
        way = choose(adapted(tiny("lfm2", dtype)), True, 2)
        assert not way.packing
        assert "its outputs move by" in way.why_unpacked


class Summing(torch.nn.Module):
    """A layer through which every token of a row sees a little of the first."""

    def __init__(self, inner, share, detached):
        super().__init__()
        self.inner, self.share, self.detached = inner, share, detached

    def forward(self, x, *args, **kwargs):
        first = x[:, :1].detach() if self.detached else x[:, :1]
        return self.inner(x + self.share * first, *args, **kwargs)


@pytest.mark.parametrize("share", [1.0, 1e-6])
@pytest.mark.parametrize("detached", [False, True])
def test_a_hand_made_leak_is_seen_in_the_fast_path_and_in_the_models_own(share, detached):
    model = tiny("llama")
    model.model.layers[1].mlp = Summing(model.model.layers[1].mlp, share, detached)
    probe = FastPath(adapted(model, ["q_proj"]))
    for switched_on in (True, False):
        assert probe.neighbours_reach(True, switched_on, nullcontext())
        assert not probe.neighbours_reach(False, switched_on, nullcontext()), "the first example is not reached"


def test_a_leak_that_only_training_has_is_seen():
    """The very path that trains: a layer that mixes a row while it trains, and not in evaluation."""

    class Mixing(torch.nn.Module):
        def forward(self, x):
            return x + 0.1 * x.mean(1, keepdim=True) if self.training else x

    model = tiny("llama")
    model.model.layers[0].mlp = torch.nn.Sequential(model.model.layers[0].mlp, Mixing())
    with pytest.raises(UserError, match=r"the padding and the other rows of its batch \(its .*size: 1"):
        choose(adapted(model, ["q_proj"]), True, 2)
    assert not choose(adapted(model, ["q_proj"]), True, 1).packing, "a row alone has no padding"


def test_rounding_by_the_rest_of_a_batch_packs_nothing_and_refuses_nothing():
    """As where a card multiplies more rows by another rule: a millionth, of which no gradient comes."""

    class Rounding(torch.nn.Module):
        def forward(self, x):
            return x + 1e-6 * x.detach().mean((0, 1))

    model = tiny("llama")
    model.model.layers[0].mlp = torch.nn.Sequential(model.model.layers[0].mlp, Rounding())
    way = choose(adapted(model, ["q_proj"]), True, 4)
    assert not way.packing
    assert "its outputs move by" in way.why_unpacked


def test_a_model_that_counts_positions_from_the_rows_beginning_is_not_packed():
    from transformers import GPT2LMHeadModel

    class Counting(GPT2LMHeadModel):
        def forward(self, input_ids=None, position_ids=None, **kwargs):
            mask = torch.ones(input_ids.shape[1], input_ids.shape[1], dtype=torch.bool).tril()
            segment = (position_ids == 0).cumsum(-1)
            mask = mask & (segment[:, :, None] == segment[:, None])
            counted = torch.arange(input_ids.shape[1]).expand_as(input_ids)
            additive = torch.zeros(mask.shape).masked_fill(~mask, -1e9)[:, None]
            changes = {"position_ids": counted, "attention_mask": additive}
            return super().forward(input_ids, **{**kwargs, **changes})

    stock = tiny("gpt2")
    model = Counting(stock.config)
    model.load_state_dict(stock.state_dict())
    way = choose(adapted(model, ["c_attn"]), True, 2)
    assert not way.packing
    assert "away from those of it alone" in way.why_unpacked


def test_dropout_is_no_leak():
    way = choose(adapted(tiny("llama"), dropout=0.5), True, 4)
    assert way.packing
    assert way.fast


def test_weights_that_are_not_finite_are_told_before_anything_is_trained():
    model = tiny("llama")
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(LlmqError, match="outputs that are not finite before anything was trained"):
        choose(adapted(model), True, 2)


@pytest.mark.slow
def test_a_hybrid_is_trained_one_example_a_row_and_the_notes_say_why(tiny_llama, tiny_jsonl, tmp_path):
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "model")
    tiny("granitemoehybrid", torch.bfloat16).save_pretrained(tmp_path / "model")
    settings = {"data": str(tiny_jsonl), "max_length": 64, "max_steps": 2, "r": 4}
    base = base_of(tmp_path / "model")
    by_probe = apply("adapt.lora", base, tmp_path / "a", **settings)
    told = by_probe.notes["training"]
    assert told["packing"] is False
    assert told["one_example_a_row"].startswith("packed, its outputs move by")
    assert by_probe.notes["tokens"]["train"]["packed_rows"] == by_probe.notes["tokens"]["train"]["used"]
    asked = apply("adapt.lora", base, tmp_path / "b", **settings, packing=False)
    assert "one_example_a_row" not in asked.notes["training"]
    assert asked.notes["training"]["loss"] == told["loss"]


@pytest.mark.slow
def test_llm_int8_of_a_leaking_model_is_seen_below_its_tolerance(tmp_path, tiny_llama, tiny_jsonl):
    """LFM2's leak is a tenth of what LLM.int8() is allowed to move: its gradient tells."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "model")
    for name, packing in (("lfm2", False), ("llama", True)):
        tiny(name, torch.bfloat16).save_pretrained(tmp_path / "model")
        stage = apply("quantize.bnb", base_of(tmp_path / "model"), tmp_path / name, bits=8)
        with stage.open("cpu") as loaded:
            loaded.module.config.use_cache = False
            way = choose(adapted(loaded.module), True, 2)
            assert way.packing is packing


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "mamba", "lfm2", "jamba", "granitemoehybrid"])
def test_sequences_that_share_a_row_are_probed_too(name):
    """Without its list of settings: a state that runs through the row moves what is scored beside it."""
    from llmq.text import prefix_attention

    said = prefix_attention.probe(tiny(name).eval(), "cpu")
    assert bool(said) == (name not in ("llama", "qwen3_moe"))
