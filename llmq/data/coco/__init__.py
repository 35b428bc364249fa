"""Images with boxes out of a COCO annotation file (JSON), or a YOLO data set (`data.yaml` and a text per image).

Every image and every box is checked before a network learns; images are decoded at each access. Networks do not learn
from crowds, and measurements ignore them, as pycocotools does; crowds, boxes without area and copies of a box are
counted. Classes are in the order of their numbers.
"""

from collections import Counter
from typing import ClassVar

from pydantic import Field

from llmq.errors import UserError
from llmq.files import at_home
from llmq.types import Data, Split
from llmq.vision.pixels import check_window


class Coco(Data):
    suits: ClassVar[frozenset[str]] = frozenset({"detector"})
    shapes: ClassVar[frozenset[str]] = frozenset({"image/boxes"})

    path: str = Field(description="a COCO annotation file, a YOLO data.yaml, or the folder that holds one")
    images: str | None = Field(None, description="folder of a COCO file's images; looked for beside it if unset")
    held_out: str | float = Field(
        0.1, description="a second COCO file, or the share set aside where no file and no 'val' says so"
    )
    window: tuple[float, float] | None = Field(
        None, description="numbers that become grey levels 0 and 255; needed where images are not 8-bit"
    )

    @classmethod
    def takes(cls, path: str) -> bool:  # the only data of this kind with a path
        return True

    def check(self) -> None:
        from llmq.data.coco.yolo import find_yaml

        for name, value in (("path", self.path), ("images", self.images), ("held_out", self.held_out)):
            if isinstance(value, str) and not at_home(value).exists():
                raise UserError(f"{name}: there is no {value!r}")
        if isinstance(self.held_out, float | int) and not 0 < self.held_out < 1:
            raise UserError(f"held_out: {self.held_out} is no share between 0 and 1")
        check_window(self.window)
        file = find_yaml(at_home(self.path))
        if file.suffix not in (".json", ".yaml", ".yml"):
            raise UserError(f"path: {self.path!r} is neither a COCO annotation file (.json) nor a YOLO data.yaml")
        if file.suffix != ".json" and (self.images or isinstance(self.held_out, str)):
            raise UserError(f"'images' and a held_out file go with a COCO file; {file.name!r} says its own folders")

    def read(self) -> Split:
        from llmq.data.coco.annotations import read_coco
        from llmq.data.coco.boxed_images import divided, split_of
        from llmq.data.coco.yolo import find_yaml, read_yolo

        self.check()
        file = find_yaml(at_home(self.path))
        if file.suffix != ".json":
            parts = read_yolo(file)
        else:
            images = at_home(self.images) if self.images else None
            files = [file] + ([at_home(self.held_out)] if isinstance(self.held_out, str) else [])
            parts = [read_coco(one, images) for one in files]
            if parts[-1].classes != parts[0].classes:
                raise UserError(f"{files[1]}: its categories are not those of {files[0]}; both need the same")
        left_out = sum((Counter(part.left_out) for part in parts), Counter())
        counts = {name: left_out[name] for part in parts for name in part.left_out}  # counts of 0 stay
        sides = (parts[0].items, parts[1].items) if len(parts) == 2 else divided(parts[0].items, float(self.held_out))
        return split_of(*sides, parts[0].classes, counts, self.window)
