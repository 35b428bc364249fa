"""The memory and the operations of passes through a language model. Pure arithmetic.

Of the bytes of activations each term is a tensor that PyTorch holds at the peak; the constants besides were measured
(`NOTES.md`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from llmq.matrix import products
from llmq.sketch import BYTES, Kind, Sketch, Work, times
from llmq.text.sizing import trials
from llmq.text.sizing.packing import in_int8, in_planes

if TYPE_CHECKING:
    from llmq.text.sizing.network import TextSketch

CHUNK = 128
"""Rows of logits that the fused loss holds at a time (`fused_loss`)."""
TILE = 128
"""Queries of a tile of attention (`attention`)."""
GRAMS = 2
"""Float32 matrices of the size of the largest Gram matrix that a solver has, with the inputs that it gathers."""
INPUT = 4e-5
"""Seconds that a solver takes for each input of a matrix, most of them between operations: 4 of 98,000."""
SORTED = 18
"""Float32 numbers a weight while the weights of a layer are sorted and pruned."""
TOKENIZER = 600
"""Bytes of an open tokenizer for each token of the vocabulary, with the text that it cut."""
GRAM_ROWS = 1024
"""Inputs that a Gram matrix gathers before it multiplies (`gram`)."""
KEPT, KEPT_PACKED, KEPT_TRAINING = 1.15, 1.3, 1.65
"""Bytes that the allocator holds for each byte of activations: freed blocks are kept, and do not fit the next ones."""
OPENED = 1.0
"""Seconds that opening a stage takes besides reading the files."""
LOGITS_TOUCHED = 10
"""The times that the loss and its gradient read or write float32 logits."""
UNPACKED = 6
"""The times that unpacking a matrix reads or writes its float values."""


def forward(sketch: TextSketch, rows: int, length: int, logits: int | None = None) -> Work:
    """One pass over `rows` sequences of `length` tokens; `logits` counts the tokens whose logits are computed."""
    tokens = rows * length
    said = tokens if logits is None else logits
    width = BYTES[sketch.dtype]
    live = tokens * (4 * sketch.hidden + 3 * sketch.inner + sketch.queries + sketch.keys) * width
    passing = live + _largest_unpacked(sketch) + said * sketch.vocabulary * width + _widened(sketch, tokens, said)
    memory = sketch.in_memory + sketch.mapped + int(passing * (KEPT_PACKED if sketch.packed else KEPT))
    return Work(memory, _products(sketch, rows, length, said), passing=sketch.mapped)


def _products(sketch: TextSketch, rows: int, length: int, said: int, learns: bool = False) -> dict[Kind, float]:
    """The operations of a pass through all blocks, told by one of them, and of the head for `said` tokens.

    With `learns`, the rate of the block holds the way back as well.
    """
    tokens = rows * length
    matrices = (*sketch.linears, *(p for p in sketch.parts if p.role == "adapter" and len(p.shape) > 1))
    # Each query sees half of the tokens on average.
    seen = length * sketch.queries * len(sketch.blocks)
    in_bytes = sum(part.weights for part in matrices if in_int8(part))
    floats = sum(part.weights for part in matrices) - (0 if learns else in_bytes)  # backwards they are floats again
    within: dict[Kind, float] = {trials.block(sketch, rows, length, learns): 2.0 * tokens * (seen + floats)}
    if in_bytes:
        within[trials.eight_bit(sketch, tokens)] = 2.0 * tokens * in_bytes
    if packed := sum(part.weights * BYTES[part.dtype] for part in matrices if part.packed and not in_int8(part)):
        within["copy"] = float(UNPACKED * packed)
    if said:
        within[trials.head(sketch, said)] = 2.0 * sketch.hidden * sketch.vocabulary * said
    return within


def widens(sketch: TextSketch) -> bool:
    """True where products of bfloat16 are made in float32, as this processor lacks them (`matrix.products`)."""
    import torch

    return sketch.dtype == "bfloat16" and not torch.cuda.is_available() and products.lacks_bfloat16()


def _widened(sketch: TextSketch, tokens: int, said: int) -> int:
    """The bytes of the largest product that is widened: the head and the logits, or a layer."""
    if not widens(sketch) or tokens < products.ROWS:
        return 0
    head = sketch.hidden * sketch.vocabulary + said * sketch.vocabulary if said >= products.ROWS else 0
    layer = max((part.weights for part in sketch.linears), default=0) + tokens * sketch.inner
    return 4 * max(head, layer)


def _largest_unpacked(sketch: TextSketch) -> int:
    """The bytes of the largest packed matrix as floats, of which one is there at a time."""
    return max((2 * part.weights * BYTES[part.dtype] for part in sketch.linears if part.packed), default=0)


def decode(sketch: TextSketch, tokens: int) -> Work:
    """Greedy decoding of `tokens` tokens, one at a time: every weight is read for each."""
    read: dict[Kind, float] = {}
    kind: Kind
    for part in sketch.parts:
        if part.role in ("linear", "head", "adapter") or part.name == sketch.head:
            if in_int8(part):
                kind = trials.eight_bit(sketch, 1)
                read[kind] = read.get(kind, 0.0) + 2.0 * part.weights * tokens
                continue
            # A packed matrix is unpacked first, but where a kernel multiplies its codes.
            floats = part.weights * BYTES[part.dtype]
            moved = float(part.opened if not part.packed else UNPACKED * floats)
            kind = "copy" if part.packed else f"{part.dtype}-vector"
            read[kind] = read.get(kind, 0.0) + moved * tokens
    return Work(sketch.in_memory, read)


def cache_bytes(sketch: TextSketch, tokens: int) -> int:
    """The bytes of keys and values of one sequence."""
    return tokens * sketch.keys * len(sketch.blocks) * BYTES[sketch.dtype]


def opening(sketch: TextSketch) -> Work:
    """Opening a stage: its files are read."""
    return Work(sketch.in_memory, {"copy": 2.0 * sketch.in_memory}, OPENED)


def saved(sketch: TextSketch, rows: int, length: int, ranks: int, checkpointed: bool) -> int:
    """The bytes of activations that a training step keeps for its backward pass, all blocks together."""
    width, tokens = BYTES[sketch.dtype], rows * length
    d, inner, q, k = sketch.hidden, sketch.inner, sketch.queries, sketch.keys
    norms = 2 * d * 4
    inputs = (d + q + d) * width  # of the adapters; layers that are given the same share it
    if any(map(in_int8, sketch.linears)):  # on a processor these layers keep what they were given, rounded or not
        inputs += (2 * d + q + inner) * width
    mixing = (q + k + 2 * inner) * width + 7 * ranks * width  # what is made again is not kept (`made_again`)
    scores = sketch.heads * (length + TILE) // 2 * width
    block = tokens * (norms + inputs + mixing + scores)
    if checkpointed:
        return block + tokens * d * width * len(sketch.blocks)
    return block * len(sketch.blocks)


def training(sketch: TextSketch, rows: int, length: int, ranks: int, states: float, checkpointed: bool) -> Work:
    """One step of a training of the adapter alone: forward, backward, and an optimizer with `states` numbers each."""
    tokens = rows * length
    adapter = [part for part in sketch.parts if part.role == "adapter"]
    learned = sum(part.weights for part in adapter)
    logits = min(CHUNK, tokens) * sketch.vocabulary * (4 + 4 + (0 if sketch.dtype == "float32" else 2))
    gradients = 4 * tokens * (sketch.inner + sketch.hidden) * BYTES[sketch.dtype]
    chunk = min(CHUNK, tokens)
    passing = max(logits + _widened(sketch, chunk, chunk), gradients + _largest_unpacked(sketch))
    memory = (
        sketch.in_memory
        + int(learned * 4 * (1 + states))
        + int(KEPT_TRAINING * (saved(sketch, rows, length, ranks, checkpointed) + passing))
    )
    # Forwards and backwards, and forwards once more; a packed matrix is unpacked each time.
    once = _products(sketch, rows, length, 0, learns=True)
    operations = {kind: (1.5 if checkpointed else 1.0) * ops for kind, ops in once.items()}
    operations["copy"] = 2 * operations.get("copy", 0.0) + LOGITS_TOUCHED * 4.0 * tokens * sketch.vocabulary
    # The gradient of the head is made with the loss.
    operations[trials.head(sketch, chunk)] = 4.0 * sketch.hidden * sketch.vocabulary * tokens
    return Work(memory, operations)


def training_whole(sketch: TextSketch, rows: int, length: int, states: float, checkpointed: bool) -> Work:
    """One step of a training of all weights, which are float32: forward, backward, and an optimizer."""
    tokens = rows * length
    learned = sketch.parameters
    chunk = min(CHUNK, tokens)
    # In 16 bits every weight has a rounded copy until the backward pass is done.
    rounded = 0 if sketch.dtype == "float32" else 2 * learned
    held = 3 * 4 * chunk * sketch.vocabulary + 4 * sketch.hidden * sketch.vocabulary
    gradients = 4 * tokens * (sketch.inner + sketch.hidden) * 4
    passing = saved(sketch, rows, length, 0, checkpointed) + max(held + _widened(sketch, chunk, chunk), gradients)
    weights = int(learned * 4 * (2 + states)) + sketch.in_memory + rounded  # with those that it began with
    once = _products(sketch, rows, length, 0, learns=True)
    # A frozen matrix takes two products a step, forwards and backwards; a trained one a third.
    operations = {kind: (2.0 if checkpointed else 1.5) * ops for kind, ops in once.items()}
    logits = LOGITS_TOUCHED * 4.0 * tokens * sketch.vocabulary
    operations["copy"] = operations.get("copy", 0.0) + logits + 4.0 * learned * (4 + 2 * states)
    operations[trials.head(sketch, chunk)] = 6.0 * sketch.hidden * sketch.vocabulary * tokens
    return Work(weights + int(KEPT_TRAINING * passing), operations)


def answers(sketch: TextSketch, rows: int, length: int) -> Work:
    """A teacher that answers one batch of a training: its weights, hidden states, and distributions of a few tokens."""
    tokens = rows * length
    kept = tokens * sketch.hidden * BYTES[sketch.dtype] + 3 * 4 * min(CHUNK, tokens) * sketch.vocabulary
    return Work(sketch.in_memory + kept, _products(sketch, rows, length, tokens))


def training_scales(sketch: TextSketch, rows: int, length: int) -> Work:
    """One step in which the scales of packed layers learn: every packed matrix is unpacked for its gradient."""
    tokens, width = rows * length, BYTES[sketch.dtype]
    floats = sum(part.weights for part in sketch.linears if part.packed) * width
    scales = sum(part.weights for part in sketch.linears if part.packed) // 32  # more than any group size gives
    kept = saved(sketch, rows, length, 0, False) + floats + 4 * tokens * sketch.vocabulary * 3
    once = _products(sketch, rows, length, tokens)
    operations = {kind: 3 * count for kind, count in once.items()}
    return Work(sketch.in_memory + 16 * scales + int(KEPT_TRAINING * kept), operations)


def calibrated(sketch: TextSketch, windows: int, length: int, batch: int, grams: bool) -> Work:
    """Block by block: all windows wait in memory, one block is there, and Gram matrices where wanted."""
    tokens, width = windows * length, BYTES[sketch.dtype]
    waiting = tokens * (2 * sketch.hidden + sketch.inner) * width
    if grams:  # a batch that waits for the solver keeps the norm of its stream and both halves of the gate as well
        waiting += tokens * (sketch.hidden + sketch.inner) * width
    pass_ = forward(sketch, max(1, batch // length), length, 0)
    widths = widths_of_groups(sketch)
    widest, largest = max(widths, default=0), max((part.weights for part in sketch.linears), default=0)
    solving = GRAMS * 4 * (widest**2 + GRAM_ROWS * widest) if grams else SORTED * 4 * largest
    within = 2 * sketch.block_bytes + waiting + solving + (pass_.memory - sketch.in_memory - sketch.mapped)
    memory = sketch.outside_bytes + TOKENIZER * sketch.vocabulary + int(KEPT_PACKED * within)
    operations = {kind: ops * windows / max(1, batch // length) for kind, ops in pass_.operations.items()}
    seconds = 0.0
    if grams:
        # Up to the diagonal alone; then a factorization and an inverse of each, and the inputs one by one.
        products = float(sum(w * w * (tokens + 2 * w) for w in widths)) * len(sketch.blocks)
        operations["float32"] = operations.get("float32", 0.0) + products
        seconds = INPUT * sum(widths) * len(sketch.blocks)
    return Work(memory, operations, seconds)


def loss_gradients(sketch: TextSketch, windows: int, length: int, batch: int) -> Work:
    """The gradients of the loss at all layers, block by block: a block is computed twice, and its inputs' gradients."""
    rows = max(1, batch // length)
    tokens, once = rows * length, forward(sketch, rows, length)
    passing = saved(sketch, rows, length, 0, True) + 3 * 4 * tokens * sketch.vocabulary  # logits, softmax, gradient
    memory = sketch.outside_bytes + 2 * sketch.block_bytes + int(KEPT_TRAINING * passing)
    return Work(memory, {kind: 3 * ops * windows / rows for kind, ops in once.operations.items()})


def widths_of_groups(sketch: TextSketch) -> list[int]:
    """The inputs of each group of layers of a block that share an input, as in most networks four."""
    return [sketch.hidden, sketch.queries, sketch.hidden, sketch.inner]


def rounding(sketch: TextSketch, names: Iterable[str]) -> Work:
    """Rounding matrices to a grid whose ranges are searched for, told by a part of the largest of them."""
    wanted = set(names)
    parts = [part for part in sketch.parts if part.name in wanted]
    largest = max(parts, key=lambda part: part.weights)
    return Work(0, {trials.grid(*largest.shape): float(sum(part.weights for part in parts))})


PROBES = 3.0
"""Seconds in which a step opens its stage again and compares answers, besides the passes themselves."""
PROBED = 16
"""Tokens of the probe of two models."""


def packing(source: TextSketch, made: TextSketch, bits: int) -> Work:
    """Packing without calibration: the weights are read, packed one by one, saved, and the stage is opened again."""
    largest = max((part.opened for part in source.linears), default=0)
    # The files of the source are mapped while the packed model grows; its head and embeddings are copied.
    memory = source.in_memory + made.in_memory + source.outside_bytes + 4 * largest
    if (
        widened := _widened(made, PROBED, PROBED)
    ) and bits == 4:  # when the stage is opened again, blocks of the first are still held
        memory += 2 * widened + made.in_memory
    written = Work(memory, {"copy": 20.0 * source.in_memory}, 2 * PROBES, passing=source.in_memory)
    return written.plus(times(forward(made, 1, PROBED), 2)).plus(opening(made))


CONVERTED = 40
"""The times that a conversion of GGUF reads or writes the float32 weights."""
READ_GGUF = 5.0
"""Seconds in which transformers reads the tokenizer of a GGUF file, besides the weights."""


def converted(base: TextSketch) -> Work:
    """A GGUF file read, dequantized tensor by tensor and written as safetensors with the tokenizer."""
    largest = max((part.weights for part in base.parts), default=0)
    return Work(base.in_memory + 2 * 4 * largest, {"copy": CONVERTED * 4.0 * base.parameters}, READ_GGUF)


def by_blocks(
    source: TextSketch, made: Sketch, changed: Iterable[str], windows: int, length: int, gathers: bool
) -> Work:
    """A change block by block; then the written stage is opened without memory for its weights."""
    work = rounding(source, changed) if made.packed else Work(0, {"copy": 8.0 * source.in_memory})
    work = work.plus(_copied(source))
    if windows:
        work = work.plus(calibrated(source, windows, length, BATCH_TOKENS, gathers))
    return work


BATCH_TOKENS = 512
"""Tokens of a calibration batch (`blockwise`)."""


CAPTURED = 1_700_000
"""Bytes of the graph of a block in a captured step of one token (`captured`), while it is recorded."""
LM_EVAL_ROW, QUESTION = 2048, 80
"""Tokens of a row of questions (`scoring`), and those assumed of a question with all of its answers."""


def timed(sketch: TextSketch, prompt_tokens: int, new_tokens: int) -> Work:
    """A prefill whose last logits alone are computed, and a decode from the cache of keys and values.

    Both caches are there at once, and the first prefill computes all logits.
    """
    prefill = forward(sketch, 1, prompt_tokens, 1)
    first = forward(sketch, 1, prompt_tokens).memory
    held = first + 2 * cache_bytes(sketch, prompt_tokens + new_tokens)
    if any(map(in_planes, sketch.linears)) and not _adapted(sketch):
        held += CAPTURED * len(sketch.blocks)
    return Work(held, passing=sketch.mapped).plus(prefill).plus(decode(sketch, new_tokens))


def _adapted(sketch: TextSketch) -> bool:
    return any(part.role == "adapter" for part in sketch.parts)


TOKEN_IN_GGUF = 40
"""Bytes of a GGUF file for each token of the vocabulary: its text, its kind, and its merge."""
GRAPH_OF_BLOCK = 60_000
"""Bytes of text that describe one block in an OpenVINO graph."""


def _copied(source: TextSketch) -> Work:
    """Writing a folder block by block; what lies outside the blocks is one file, which is read back to be compared."""
    outside = source.outside_bytes
    memory = max(2 * outside, outside + 4 * source.block_bytes)
    return Work(memory, {"copy": 6.0 * source.in_memory}, PROBES, passing=outside if memory == 2 * outside else 0)


MERGED = 15
"""Bytes for each weight of a block while an adapter is added (`merging`): float32, copies, what is written."""
MERGED_OUTSIDE = 6.5
"""Bytes for each weight outside the blocks, where head and embeddings are two: float32, rounded, written."""


def merging(source: TextSketch, made: TextSketch) -> Work:
    """Base and adapter added block by block; a packed base and the adapter are there as a whole."""
    width = BYTES[made.dtype]
    block, outside = made.block_bytes // width, made.outside_bytes // width
    if not any(part.role == "head" for part in made.parts):
        outside += made.vocabulary * made.hidden
    memory = _stays(source) + max(MERGED * block + 4 * outside, MERGED_OUTSIDE * outside)
    return Work(int(memory), {"copy": 24.0 * made.in_memory}, OPENED + PROBES)


def by_block(source: TextSketch, made: TextSketch, windows: int, length: int) -> Work:
    """The logits of an adapted model and of the merged one, all windows gone through a block before the next."""
    passes = [forward(sketch, 1, length) for sketch in (source, made)]
    largest = max(p.memory - s.in_memory - s.mapped for p, s in zip(passes, (source, made), strict=True))
    waiting = 2 * windows * length * made.hidden * BYTES[made.dtype]
    pages = 2 * (made.block_bytes + made.outside_bytes)
    both = times(passes[0], windows).plus(times(passes[1], windows))
    softmax = 6 * 8 * 32 * made.vocabulary  # float64, of as many tokens as `losses.ROWS`
    both = both.plus(divergence(made, windows * length))
    return replace(both, memory=_stays(source) + pages + waiting + 2 * largest + softmax, passing=pages)


def divergence(sketch: TextSketch, tokens: int) -> Work:
    """The time of the divergence of two models on their logits after some tokens."""
    return Work(0, {trials.divergence(sketch.vocabulary): float(tokens * sketch.vocabulary)})


def _stays(source: TextSketch) -> int:
    """The bytes of an adapted base that are in memory, not in its files, while its blocks come and go."""
    base = int(KEPT_PACKED * source.in_memory) if source.packed else 0
    return base + sum(part.opened for part in source.parts if part.role == "adapter" and not source.packed)
