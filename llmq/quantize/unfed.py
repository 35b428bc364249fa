"""Layers of an exported graph that the input does not reach."""

from typing import Any

WEIGHTED = ("Convolution", "GroupConvolution", "ConvolutionBackpropData", "GroupConvolutionBackpropData", "MatMul")


def unfed_layers(graph: Any) -> list[str]:
    """The layers that compute the same for every input of one shape: of learned queries, or of positions.

    OpenVINO computes them once, as it compiles the graph for that shape. Of int8 weights version 2026.4 cannot do so:
    `Check 'm_element_type.is_static()' failed`. They stay in float, which costs no time.
    """
    from llmq.models.exported import users

    fed: set[str] = set()
    waiting = list(graph.get_parameters())
    while waiting:
        operation = waiting.pop()
        # Of the input a shape is known before any of the numbers.
        if operation.get_name() not in fed and operation.get_type_name() != "ShapeOf":
            fed.add(operation.get_name())
            waiting += users(operation)
    layers = (o for o in graph.get_ordered_ops() if o.get_type_name() in WEIGHTED)
    return [layer.get_friendly_name() for layer in layers if layer.get_name() not in fed]
