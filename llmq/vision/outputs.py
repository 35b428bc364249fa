"""A network of transformers as a function from one tensor to one or several."""

from torch import Tensor, nn


class Outputs(nn.Module):
    """A function from pixels to the outputs of a model that have these names: one tensor, or a tuple."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, pixels: Tensor) -> Tensor | tuple[Tensor, ...]:
        outputs = self.model(pixel_values=pixels)  # (n, channels, height, width) to named outputs
        tensors = tuple(getattr(outputs, name) for name in self.names)
        return tensors if len(tensors) > 1 else tensors[0]
