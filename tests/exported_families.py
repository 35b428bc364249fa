"""A family of two small networks whose graphs are quick to make: what steps and tasks see of a real one."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from llmq.artifact import Artifact
from llmq.vision.family import ImageModel

SIDE = 16


class TwoHeads(nn.Module):
    """Two outputs of unlike shapes, as a detector has; one of them far from zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))
        self.near, self.far = nn.Conv2d(width, 4, 1), nn.Conv2d(width, 2, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.trunk(x).relu()
        return self.near(x), self.far(x) - 4.5


class Heads(ImageModel):
    """It takes images of any size."""

    kind: ClassVar[str] = "detector"
    any_size: ClassVar[bool] = True
    shapes: ClassVar[frozenset[str]] = frozenset({"image/boxes"})

    width: int = 96

    def network(self) -> Any:
        return TwoHeads(self.width)

    def prepare(self, images: Sequence[Any]) -> Any:
        return torch.stack([torch.from_numpy(image).permute(2, 0, 1).float() / 127.5 - 1 for image in images])

    def example(self, batch_size: int) -> Any:
        return torch.randn(batch_size, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def base(folder: Any, **settings: Any) -> Artifact:
    """It at rest in `folder`, with random weights."""
    from llmq.vision.state import save_network

    model = Heads(**settings)
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    save_network(model.network(), folder)
    return Artifact(model, folder)
