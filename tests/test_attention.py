"""Attention by tiles against PyTorch's own, and in models that attend otherwise too."""

import pytest
import torch
from helpers import logits_of, some_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from llmq.text import attention
from llmq.text.attention import TILE, causal, tiled

quickly = settings(max_examples=25, deadline=None, database=None)
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SHAPE, "num_key_value_heads": 2, "head_dim": 8}
MODELS = {
    "llama": GROUPED,
    "mistral": {**GROUPED, "sliding_window": 40},
    "gemma2": {**GROUPED, "sliding_window": 40, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {**GROUPED, "sliding_window": 40},
    "qwen3": GROUPED,
    "gpt_oss": {**GROUPED, "sliding_window": 40, "num_local_experts": 2, "num_experts_per_tok": 1},
    "gpt_neox": SHAPE,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "opt": {**SHAPE, "ffn_dim": 48, "word_embed_proj_dim": 32},
}
"""Family -> its configuration: plain causal attention, sliding windows, soft caps, sinks, other names."""


pytestmark = pytest.mark.usefixtures("one_thread")


def states(rows, heads, groups, tokens, d, dtype=torch.float32):
    """Query, key and value that ask for gradients."""
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(rows, n, tokens, d) for n in (heads, groups, groups)]
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def reference(query, key, value, scaling):
    return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)


def tiny(family, dtype=torch.float32, **changes):
    """A random model of a family."""
    from transformers import AutoConfig, AutoModelForCausalLM

    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(
        family, vocab_size=200, max_position_embeddings=512, **special, **{**MODELS[family], **changes}
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@pytest.fixture
def taken(monkeypatch):
    """How many tokens the products over tiles were asked for, each time."""
    tokens = []
    monkeypatch.setattr(attention, "causal", lambda q, *rest: tokens.append(q.shape[2]) or causal(q, *rest))
    return tokens


@pytest.mark.parametrize("tokens", [1, 7, TILE - 1, TILE, TILE + 1, 2 * TILE, 300])
@pytest.mark.parametrize(("rows", "heads", "groups", "d"), [(1, 4, 4, 8), (2, 6, 2, 8), (3, 3, 1, 16)])
def test_it_is_causal_attention_and_so_is_its_gradient(rows, heads, groups, d, tokens):
    inputs = states(rows, heads, groups, tokens, d)
    ours, theirs = causal(*inputs, 0.37), reference(*inputs, 0.37)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    direction = torch.randn(ours.shape, generator=torch.Generator().manual_seed(9))
    for mine, its in zip(
        *(torch.autograd.grad((out * direction).sum(), inputs) for out in (ours, theirs)), strict=True
    ):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [7, TILE + 9])
def test_in_bfloat16_no_float32_is_kept_and_the_gradient_stays(tokens):
    inputs = states(2, 6, 2, tokens, 16, torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda it: kept.append(it.dtype) or it, lambda it: it):
        ours = causal(*inputs, 0.25)
    exact = [it.detach().double().requires_grad_() for it in inputs]
    theirs = reference(*exact, 0.25)
    direction = torch.randn(ours.shape, generator=torch.Generator().manual_seed(9))
    mine = torch.autograd.grad((ours * direction).sum(), inputs)
    its = torch.autograd.grad((theirs * direction).sum(), exact)
    assert torch.float32 not in kept
    for one, other in zip(mine, its, strict=True):
        assert (one.double() - other).norm() <= 0.01 * other.norm()


@quickly
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 2 * TILE + 5), st.sampled_from([4, 10]))
def test_any_shape_will_do(rows, groups, per_group, tokens, d):
    with torch.no_grad():
        inputs = states(rows, groups * per_group, groups, tokens, d)
        torch.testing.assert_close(causal(*inputs, d**-0.5), reference(*inputs, d**-0.5), rtol=1e-5, atol=1e-5)


def test_nothing_flows_from_the_future():
    inputs = states(1, 4, 2, 200, 8)
    for x, gradient in zip(inputs, torch.autograd.grad(causal(*inputs, 1.0)[0, :, 150].sum(), inputs), strict=True):
        assert not gradient[0, :, 151:].any(), x.shape


def test_bfloat16_stays_and_is_as_exact_as_the_fused_kernel():
    inputs = [x.detach() for x in states(2, 4, 2, 300, 16, torch.bfloat16)]
    ours, exact = causal(*inputs, 0.25), reference(*(x.double() for x in inputs), 0.25)
    assert ours.dtype == torch.bfloat16
    off, theirs = ((made.double() - exact).norm() for made in (ours, reference(*inputs, 0.25)))
    assert off < 2 * theirs


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("tokens", [24, 300])
def test_a_model_says_the_same_by_tiles(family, tokens):
    module, ids = tiny(family), some_ids(2, tokens) % 200
    before = logits_of(module, ids)
    with tiled(module):
        torch.testing.assert_close(logits_of(module, ids), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "gpt2"])
def test_plain_causal_attention_goes_by_tiles(family, taken):
    module = tiny(family)
    with tiled(module):
        logits_of(module, some_ids(2, 150))
    assert taken == [150, 150]


def test_of_layers_with_a_window_only_the_others_go_by_tiles(taken):
    module = tiny("gemma3_text", layer_types=["sliding_attention", "full_attention"])
    with tiled(module):
        logits_of(module, some_ids(2, 150))
    assert taken == [150]


def test_padding_is_masked_and_a_cache_is_used_as_without(taken):
    module, ids = tiny("llama"), some_ids(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0

    def answers():
        with torch.inference_mode():
            first = module(input_ids=ids[:, :30], use_cache=True)
            second = module(input_ids=ids[:, 30:39], past_key_values=first.past_key_values)
            third = module(input_ids=ids[:, 39:], past_key_values=second.past_key_values)
            return second.logits, third.logits, module(input_ids=ids, attention_mask=mask).logits[:, 9:]

    before = answers()
    with tiled(module):
        for mine, its in zip(answers(), before, strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)
    assert taken == [30, 30]


def test_gradients_pass_through_a_model_by_tiles():
    module, ids = tiny("llama"), some_ids(2, 150)

    def gradient():
        embedded = module.get_input_embeddings()(ids).detach().requires_grad_()
        return torch.autograd.grad(module(inputs_embeds=embedded).logits.logsumexp(-1).sum(), embedded)[0]

    before = gradient()
    with tiled(module):
        torch.testing.assert_close(gradient(), before, rtol=1e-3, atol=1e-5)


def test_dropout_in_training_is_not_lost(taken):
    module = tiny("llama", attention_dropout=0.5).train()
    with tiled(module), torch.no_grad():
        first, second = (module(input_ids=some_ids()).logits for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_model_is_left_as_it_was_even_after_an_error(implementation, taken):
    from transformers import AttentionInterface, AttentionMaskInterface

    module, ids = tiny("llama"), some_ids()
    module.set_attn_implementation(implementation)
    before = logits_of(module, ids)
    with tiled(module):
        logits_of(module, ids)
    with pytest.raises(ValueError, match="exactly one"), tiled(module):
        logits_of(module, None)
    assert len(taken) == (2 if implementation == "sdpa" else 0)
    assert module.config._attn_implementation == implementation
    assert torch.equal(logits_of(module, ids), before)
    assert attention.NAME not in AttentionInterface()
    assert attention.NAME not in AttentionMaskInterface()
