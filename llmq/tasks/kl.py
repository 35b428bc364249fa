"""How far the outputs of one model lie from another's."""

from collections.abc import Sequence
from typing import Any

from llmq.statistics import ratio_stderr
from llmq.tasks.windows import Window, padded
from llmq.types import Better, Measurement, Samples


def compare_outputs(
    reference: Any, other: Any, windows: Sequence[Window], device: str, task: str, reference_name: str, other_name: str
) -> tuple[Measurement, ...]:
    """Mean KL(reference || other) in nats a token, and how often both put the same token first."""
    import torch

    divergences, agreements, weights = [], [], []
    with torch.inference_mode():
        for window in windows:
            ids, _ = padded([window.tokens], device)
            p, q = (
                m(input_ids=ids, use_cache=False).logits[0, :-1].double().log_softmax(-1) for m in (reference, other)
            )
            divergences.append(float(torch.sum(p.exp() * (p - q))))
            agreements.append(float((p.argmax(-1) == q.argmax(-1)).sum()))
            weights.append(float(len(p)))
    protocol = (
        f"{other_name} against {reference_name} on held-out text, {len(windows)} windows, {sum(weights):.0f} tokens"
    )

    def measured(metric: str, values: list[float], unit: str, better: Better) -> Measurement:
        mean, stderr = ratio_stderr(values, weights)
        samples = Samples(tuple(values), tuple(weights))
        return Measurement(task, metric, mean, unit, better, len(values), stderr, protocol, samples)

    return (
        measured("kl_divergence", divergences, "nats/token", "lower"),
        measured("top1_agreement", agreements, "share of tokens", "higher"),
    )
