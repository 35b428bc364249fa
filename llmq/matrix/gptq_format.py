"""The GPTQ checkpoint format, as AutoGPTQ, GPTQModel, transformers and vLLM read it.

`qweight` int32 `[inputs * bits / 32, outputs]` holds the codes as a stream of bits along the inputs, `qzeros` int32
`[groups, outputs * bits / 32]` the zeros less one along the outputs, `scales` float16 `[groups, outputs]`, `g_idx`
int32 `[inputs]` the group of each input. Format `gptq_v2` keeps the zeros as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from llmq.errors import LlmqError
from llmq.matrix.grid import Quantized

if TYPE_CHECKING:
    from torch import Tensor

ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}
"""Checkpoint format -> the number that its files subtract from each zero point."""
TENSORS = ("qweight", "qzeros", "scales", "g_idx")


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes `[n, m]` as a little-endian stream of bits along `n`: int32 `[ceil(n * bits / 32), m]`."""
    import torch

    count, width = codes.shape
    if 8 % bits == 0:  # whole codes in each byte
        padded = torch.zeros(-(-count * bits // 32), 4, 8 // bits, width, dtype=torch.uint8, device=codes.device)
        padded.view(-1, width)[:count] = codes
        octets = torch.zeros_like(padded[:, :, 0])  # (words, bytes of a word, m)
        for place in range(8 // bits):
            octets |= padded[:, :, place] << (place * bits)
        return octets.transpose(1, 2).reshape(-1).view(torch.int32).view(-1, width)
    padded = torch.zeros(-(-count // 32) * 32, width, dtype=torch.int32, device=codes.device)
    padded[:count] = codes
    padded = padded.view(-1, 32, width)  # 32 codes are `bits` whole words, whatever the bits
    words = torch.zeros(len(padded), bits, width, dtype=torch.int32, device=codes.device)
    for place in range(32):
        word, shift = divmod(place * bits, 32)
        words[:, word] |= padded[:, place] << shift
        if shift + bits > 32:  # 3 bits: two codes of 32 lie across two words
            words[:, word + 1] |= padded[:, place] >> (32 - shift)
    return words.view(-1, width)[: -(-count * bits // 32)].contiguous()


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of each column of a stream: uint8 `[count, m]`."""
    import torch

    width = words.shape[1]
    if 8 % bits == 0:
        whole = words.clone(memory_format=torch.contiguous_format)  # to be read as bytes, its strides must be exact
        octets = whole.view(torch.uint8).view(-1, width, 4).transpose(1, 2)  # (words, bytes of a word, m)
        codes = torch.empty(len(words), 4, 8 // bits, width, dtype=torch.uint8, device=words.device)
        for place in range(8 // bits):
            codes[:, :, place] = (octets >> (place * bits)) & (2**bits - 1)
        return codes.view(-1, width)[:count]
    padded = torch.zeros(-(-count // 32) * bits, width, dtype=torch.int32, device=words.device)
    padded[: len(words)] = words
    padded = padded.view(-1, bits, width)  # (blocks of 32 codes, words of a block, m)
    codes = torch.empty(len(padded), 32, width, dtype=torch.uint8, device=words.device)
    for place in range(32):
        word, shift = divmod(place * bits, 32)
        code = padded[:, word] >> shift  # copies the sign bit into the upper bits, which the mask clears
        if shift + bits > 32:
            code = (code & (2 ** (32 - shift) - 1)) | (padded[:, word + 1] << (32 - shift))
        codes[:, place] = code & (2**bits - 1)
    return codes.view(-1, width)[:count]


def to_tensors(made: Quantized, stored_as: str = "gptq") -> dict[str, Tensor]:
    """The four tensors of one layer. Raises `LlmqError` if they unpack to other codes, scales, zeros or groups."""
    import torch

    zeros = made.zeros.t() - ZERO_OFFSETS[stored_as]  # (outputs, groups)
    tensors = {
        "qweight": pack(made.codes, made.bits),  # (inputs * bits / 32, outputs)
        "qzeros": pack(zeros.to(torch.int32), made.bits).t().contiguous(),  # (groups, outputs * bits / 32)
        "scales": made.scales.half().contiguous(),
        "g_idx": made.g_idx.to(torch.int32, copy=True),
    }
    unpacked = from_tensors(tensors, made.bits, stored_as)
    for name in ("codes", "scales", "zeros", "g_idx"):
        if not bool((getattr(unpacked, name) == getattr(made, name)).all()):
            raise LlmqError(f"{name} of {made.bits} bits are others once packed; say so to the makers of llmq")
    return tensors


def from_tensors(tensors: Mapping[str, Tensor], bits: int, stored_as: str = "gptq") -> Quantized:
    """The quantized matrix that the four tensors of a layer hold."""
    zero_offset = ZERO_OFFSETS[stored_as]
    inputs, outputs = len(tensors["g_idx"]), tensors["scales"].shape[1]
    words = tensors["qzeros"].t()  # (words, groups)
    if bits != 3:
        # Other writers subtract from whole words, where a zero of 0 borrows from its neighbour; the sum gives it back.
        words = words + zero_offset * sum(1 << shift for shift in range(0, 31, bits))
        zero_offset = 0
    zeros = (unpack(words, bits, outputs).t().int() + zero_offset) % 2**bits  # (groups, outputs)
    return Quantized(unpack(tensors["qweight"], bits, inputs), tensors["scales"], zeros, tensors["g_idx"], bits)
