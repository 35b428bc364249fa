"""The GPTQ checkpoint format: against bits written one by one, and as other readers and writers have it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmq.matrix.gptq_format import from_tensors, pack, to_tensors, unpack
from llmq.matrix.grid import Quantized, round_to_nearest
from llmq.matrix.solver import elimination, solve

quickly = settings(max_examples=40, deadline=None, database=None)
BITS = [2, 3, 4, 8]
ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
"""A one in every field of a word: what other writers take from whole words of zeros."""


pytestmark = pytest.mark.usefixtures("one_thread")


def some(bits, *shape, low=0, seed=0):
    """Random codes."""
    return torch.randint(low, 2**bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def signed(word):
    """A word of 32 bits as int32 has it."""
    return word - 2**32 if word >= 2**31 else word


def stream(codes, bits):
    """Words of a column of codes, written as one long integer."""
    whole = sum(code << (bits * i) for i, code in enumerate(codes))
    count = -(-len(codes) * bits // 32)
    return [signed(whole >> (32 * i) & 0xFFFFFFFF) for i in range(count)]


def ten_one_ten_one_ten(codes):
    """Three words of 32 codes of 3 bits as GPTQ-for-LLaMa has them: 10, the two halves of one, 10, of one, 10."""
    first, second, third = 0, 0, 0
    for i, code in enumerate(codes[:10]):
        first |= code << (3 * i)
    first |= (codes[10] & 3) << 30
    second |= codes[10] >> 2
    for i, code in enumerate(codes[11:21]):
        second |= code << (3 * i + 1)
    second |= (codes[21] & 1) << 31
    third |= codes[21] >> 1
    for i, code in enumerate(codes[22:]):
        third |= code << (3 * i + 2)
    return [signed(word) for word in (first, second, third)]


def with_zeros(zeros, bits):
    """A matrix of 32 inputs with these zeros `[groups, outputs]`."""
    groups, outputs = zeros.shape
    g_idx = torch.arange(32, dtype=torch.int32) // (32 // groups)
    return Quantized(some(bits, 32, outputs), torch.ones(groups, outputs), zeros.float(), g_idx, bits)


@pytest.mark.parametrize("bits", BITS)
@quickly
@given(st.integers(1, 131), st.integers(1, 7), st.integers(0, 1000))
def test_what_is_packed_is_unpacked_and_is_a_stream_of_bits(bits, count, width, seed):
    codes = some(bits, count, width, seed=seed)
    words = pack(codes, bits)
    assert words.dtype == torch.int32
    assert torch.equal(unpack(words, bits, count), codes)
    for column in range(width):
        assert words[:, column].tolist() == stream(codes[:, column].tolist(), bits)
    assert torch.equal(unpack(words.repeat(2, 3)[: len(words), :width], bits, count), codes)  # a part of a matrix
    assert torch.equal(unpack(words.t().contiguous().t(), bits, count), codes)  # as zeros are stored


@quickly
@given(st.lists(st.integers(0, 7), min_size=32, max_size=32))
def test_three_bits_lie_as_ten_one_ten_one_ten(codes):
    assert pack(torch.tensor([codes]).t(), 3).flatten().tolist() == ten_one_ten_one_ten(codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("desc_act", [False, True])
def test_what_is_stored_is_read(bits, group_size, sym, desc_act):
    generator = torch.Generator().manual_seed(bits)
    weight, inputs = torch.randn(64, 256, generator=generator), torch.randn(300, 256, generator=generator)
    order = torch.randperm(256, generator=generator) if desc_act else torch.arange(256)
    upper, _ = elimination(inputs.t() @ inputs, 0.01, order)
    made = solve(weight, upper, bits, group_size, sym, order=order if desc_act else None)
    tensors = to_tensors(made)
    groups = made.scales.shape[0]
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "qweight": (256 * bits // 32, 64),
        "qzeros": (groups, 64 * bits // 32),
        "scales": (groups, 64),
        "g_idx": (256,),
    }
    assert tensors["scales"].dtype == torch.float16
    read = from_tensors(tensors, bits)
    assert torch.equal(read.codes, made.codes)
    assert torch.equal(read.zeros, made.zeros.int())
    assert torch.equal(read.scales.float(), made.scales)
    assert torch.equal(read.g_idx, made.g_idx)
    assert torch.equal(read.weight(), made.weight())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("outputs", [1, 5, 13, 37])
def test_shapes_that_do_not_fill_their_words_are_read_back(bits, outputs):
    made = round_to_nearest(torch.randn(outputs, 23, generator=torch.Generator().manual_seed(0)), bits, -1, False)
    read = from_tensors(to_tensors(made), bits)
    assert torch.equal(read.weight(), made.weight())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", [1e-6, 1e-3, 1, 1e3])
def test_float16_holds_the_scales_exactly(bits, size):
    made = round_to_nearest(size * torch.randn(32, 64, generator=torch.Generator().manual_seed(0)), bits, 32, False)
    assert (made.scales > 0).all()
    assert torch.equal(made.scales.half().float(), made.scales)
    assert torch.equal(made.scales.bfloat16().float(), made.scales)


@pytest.mark.parametrize("bits", BITS)
@quickly
@given(st.integers(0, 1000))
def test_zeros_are_stored_less_one(bits, seed):
    zeros = some(bits, 2, 32, low=1, seed=seed)
    for row, stored in zip(zeros, to_tensors(with_zeros(zeros, bits))["qzeros"], strict=True):
        assert stored.tolist() == stream([zero - 1 for zero in row.tolist()], bits)


@pytest.mark.parametrize("bits", ONES)
@quickly
@given(st.integers(0, 1000))
def test_zeros_less_one_by_whole_words_are_read_even_where_a_zero_is_nought(bits, seed):
    """GPTQModel's way: a zero of 0 borrows from its neighbour."""
    zeros = some(bits, 2, 32, seed=seed) * (some(1, 2, 32, seed=seed + 1))
    words = [[signed((word - ONES[bits]) & 0xFFFFFFFF) for word in stream(row, bits)] for row in zeros.tolist()]
    tensors = {**to_tensors(with_zeros(zeros, bits), "gptq_v2"), "qzeros": torch.tensor(words, dtype=torch.int32)}
    assert torch.equal(from_tensors(tensors, bits).zeros, zeros.int())


@quickly
@given(st.integers(0, 1000))
def test_zeros_of_three_bits_are_less_one_each_for_itself(seed):
    """GPTQModel's way for 3 bits, whose fields lie across words: a zero of 0 is stored as 7."""
    zeros = some(3, 2, 32, seed=seed)
    words = [stream([(zero - 1) % 8 for zero in row], 3) for row in zeros.tolist()]
    tensors = {**to_tensors(with_zeros(zeros, 3), "gptq_v2"), "qzeros": torch.tensor(words, dtype=torch.int32)}
    assert torch.equal(from_tensors(tensors, 3).zeros, zeros.int())


@pytest.mark.parametrize("bits", BITS)
def test_version_two_stores_zeros_as_they_are(bits):
    zeros = some(bits, 2, 32)
    words = [stream(row, bits) for row in zeros.tolist()]
    tensors = {**to_tensors(with_zeros(zeros, bits), "gptq_v2"), "qzeros": torch.tensor(words, dtype=torch.int32)}
    assert torch.equal(from_tensors(tensors, bits, stored_as="gptq_v2").zeros, zeros.int())
