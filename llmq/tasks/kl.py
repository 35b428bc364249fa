"""How far the outputs of one model lie from another's."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmq.data.tokens import IGNORED
from llmq.statistics import ratio_stderr
from llmq.tasks.windows import Window, padded
from llmq.types import Better, Measurement, Samples


@dataclass(frozen=True)
class Apart:
    """Sums over the tokens of each window: KL(reference || other) in nats, and how often both put one token first."""

    divergences: tuple[float, ...]
    agreements: tuple[float, ...]
    tokens: tuple[float, ...]


def apart(reference: Any, other: Any, windows: Sequence[Window], device: str) -> Apart:
    """Both models on every window, from float64 softmax over their logits."""
    import torch

    from llmq.terminal import track

    sums: list[tuple[float, float, float]] = []
    with torch.inference_mode():
        for window in track(windows, "divergence"):
            ids, labels = padded([window.tokens], device)
            scored = labels[0] != IGNORED  # (tokens,): of a completion its prompt is not
            p, q = (
                m(input_ids=ids, use_cache=False).logits[0, scored].double().log_softmax(-1) for m in (reference, other)
            )
            agreed = (p.argmax(-1) == q.argmax(-1)).sum()
            sums.append((float(torch.sum(p.exp() * (p - q))), float(agreed), float(len(p))))
    divergences, agreements, tokens = zip(*sums, strict=True)
    return Apart(divergences, agreements, tokens)


def figures(found: Apart, task: str, kl: str, protocol: str) -> tuple[Measurement, Measurement]:
    """Mean divergence, under the name `kl`, and top-1 agreement, with the sums of each window kept."""

    def measured(metric: str, values: tuple[float, ...], unit: str, better: Better) -> Measurement:
        mean, stderr = ratio_stderr(values, found.tokens)
        samples = Samples(values, found.tokens)
        return Measurement(task, metric, mean, unit, better, len(values), stderr, protocol, samples)

    return (
        measured(kl, found.divergences, "nats/token", "lower"),
        measured("top1_agreement", found.agreements, "share of tokens", "higher"),
    )


def compare_outputs(
    reference: Any, other: Any, windows: Sequence[Window], device: str, task: str, reference_name: str, other_name: str
) -> tuple[Measurement, ...]:
    """Mean KL(reference || other) in nats a token, and how often both put the same token first."""
    found = apart(reference, other, windows, device)
    tokens = f"{len(windows)} windows, {sum(found.tokens):.0f} tokens"
    protocol = f"{other_name} against {reference_name} on held-out text, {tokens}"
    return figures(found, task, "kl_divergence", protocol)
