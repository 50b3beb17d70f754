"""Draw the demo's data set: scenes of coloured shapes with five captions each; and parse captions to score them.

Written to disk in COCO 2017's layout, so that the demo runs the same code as real photographs.
Does not know about models. Equal seeds draw equal files.

A scene has one group of shapes at one of five positions, or two groups in one of four relations. A group is one to
three shapes of one size, colour and kind.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from tqdm import tqdm

from config import UserError
from utils import write_text

COLOURS = {
    "red": (214, 39, 40),
    "orange": (255, 140, 20),
    "yellow": (240, 214, 30),
    "green": (44, 150, 60),
    "blue": (40, 90, 214),
    "purple": (130, 50, 170),
    "pink": (250, 150, 200),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": 8.0, "large": 14.0}  # radius in pixels of a 96-pixel picture
COUNTS = {"a": 1, "two": 2, "three": 3}
PLACES = ("at the top", "at the bottom", "on the left", "on the right", "in the middle")
RELATIONS = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}  # and their inverses
SIDE = 96
TWO_GROUPS = (1, 3)  # of every five scenes, those with these indices have two groups
ONE_GROUP = (
    "{one} {where}; there {is_} {one} {where}; {where} there {is_} {one}; {where} {one}; a picture of {one} {where}"
)
TWO_GROUPS_TOLD = "{one} {where} {other}; there {is_} {one} {where} {other}; a picture of {one} {where} {other}"
SPLITS = {"train": "train2017", "val": "val2017", "test": "test2017"}


@dataclass(frozen=True)
class Group:
    """One to three shapes of one kind, in a row or a column."""

    count: int
    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        word = next(word for word, count in COUNTS.items() if count == self.count)
        return f"{word} {self.size} {self.colour} {self.shape}{self.plural}"

    @property
    def plural(self) -> str:
        """The plural ending of the shape's name."""
        return "" if self.count == 1 else "es" if self.shape == "cross" else "s"


@dataclass(frozen=True)
class Scene:
    """The content of a picture: one group and its position, or two groups and where the first is from the second."""

    groups: tuple[Group, ...]
    where: str

    @property
    def inverse(self) -> Scene:
        """The same scene, described from its other group."""
        return Scene(self.groups[::-1], RELATIONS[self.where]) if len(self.groups) == 2 else self

    def statements(self) -> list[str]:
        """Every caption that states the complete scene: five for one group, six for two."""
        if len(self.groups) == 1:
            return self._captions_by(ONE_GROUP)
        return self._captions_by(TWO_GROUPS_TOLD) + self.inverse._captions_by(TWO_GROUPS_TOLD)

    def _captions_by(self, forms: str) -> list[str]:
        one, other = self.groups[0], self.groups[-1]
        is_ = "is" if one.count == 1 else "are"
        return [form.format(one=one, is_=is_, where=self.where, other=other) for form in forms.split("; ")]

    def captions(self, rng: random.Random) -> list[str]:
        """Five different captions."""
        return rng.sample(self.statements(), 5)


def random_scene(rng: random.Random, groups: int) -> Scene:
    """Draw a scene with this number of groups, each attribute uniformly; two groups differ in colour or shape."""

    def group() -> Group:
        colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
        return Group(rng.randint(1, 3), rng.choice(list(SIZES)), colour, shape)

    if groups == 1:
        return Scene((group(),), rng.choice(PLACES))
    first = second = group()
    while (first.colour, first.shape) == (second.colour, second.shape):
        second = group()
    return Scene((first, second), rng.choice(list(RELATIONS)))


def group_centres(scene: Scene) -> list[tuple[float, float, bool]]:
    """Each group's centre, as fractions of the picture, and whether its shapes are in a row (not a column)."""
    places = {"at the top": (0.5, 1 / 6), "at the bottom": (0.5, 5 / 6), "on the left": (1 / 6, 0.5)}
    places |= {"on the right": (5 / 6, 0.5), "in the middle": (0.5, 0.5)}
    if len(scene.groups) == 1:
        return [(*places[scene.where], scene.where not in ("on the left", "on the right"))]
    upright = scene.where in ("left of", "right of")
    low, high = 0.23, 0.77
    ends = (low, high) if scene.where in ("left of", "above") else (high, low)
    return [(end, 0.5, False) if upright else (0.5, end, True) for end in ends]


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """Draw the scene as a SIDE x SIDE RGB picture; the rng moves groups and shapes a little, tints the background."""
    scale = 2  # drawn large and averaged down, for smooth edges
    ground = tuple(rng.randint(225, 250) for _ in range(3))
    picture = Image.new("RGB", (SIDE * scale, SIDE * scale), ground)
    canvas = ImageDraw.Draw(picture)
    step = SIDE / 3
    for group, (centre_x, centre_y, side_by_side) in zip(scene.groups, group_centres(scene), strict=True):
        slack = (3 - group.count) * 4 + 1  # few shapes have more room along their line
        along, across = rng.uniform(-slack, slack), rng.uniform(-1.5, 1.5)
        for index in range(group.count):
            offset = (index - (group.count - 1) / 2) * step + along
            x, y = (offset, across) if side_by_side else (across, offset)
            x, y = x + centre_x * SIDE + rng.uniform(-0.8, 0.8), y + centre_y * SIDE + rng.uniform(-0.8, 0.8)
            draw_shape(canvas, group, x * scale, y * scale, SIZES[group.size] * rng.uniform(0.94, 1.06) * scale)
    return picture.reduce(scale)


def draw_shape(canvas: ImageDraw.ImageDraw, group: Group, x: float, y: float, radius: float) -> None:
    """Draw one shape around (x, y), in pixels."""
    colour = COLOURS[group.colour]
    if group.shape == "circle":
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    elif group.shape == "square":
        half = radius * 0.86
        canvas.rectangle((x - half, y - half, x + half, y + half), fill=colour)
    elif group.shape == "triangle":
        canvas.polygon([(x, y - radius), (x - radius, y + 0.8 * radius), (x + radius, y + 0.8 * radius)], fill=colour)
    else:
        arm = radius * 0.32
        canvas.rectangle((x - radius, y - arm, x + radius, y + arm), fill=colour)
        canvas.rectangle((x - arm, y - radius, x + arm, y + radius), fill=colour)


def make_scene(seed: int, split: str, index: int) -> tuple[Scene, list[str], random.Random]:
    """Make scene number `index` of a split, its captions, and the rng to draw it with."""
    rng = random.Random(f"{seed} {split} {index}")
    scene = random_scene(rng, 2 if index % 5 in TWO_GROUPS else 1)
    return scene, scene.captions(rng), rng


def already_drawn(directory: Path, split: str, recipe: dict[str, Any], size: int) -> bool:
    """Whether a split is already drawn by this recipe. Raises UserError if the folder holds another data set."""
    annotations = directory / "annotations" / f"captions_{SPLITS[split]}.json"
    foreign = UserError(f"{directory} holds another data set: choose an empty --data-dir for the drawn scenes")
    try:
        content = json.loads(annotations.read_text(encoding="utf-8"))
        if content["info"]["drawn"] != recipe["drawn"]:
            raise foreign
        return bool(content["info"] == recipe and len(content["images"]) == size)
    except FileNotFoundError:
        if any(path.suffix != ".png" for path in (directory / SPLITS[split]).glob("*")):
            raise foreign from None
        return False
    except (OSError, ValueError, KeyError, TypeError):
        raise foreign from None


def draw_scenes(directory: Path, sizes: dict[str, int], seed: int = 0) -> None:
    """Draw `sizes[split]` scenes for each split into `directory` in COCO 2017's layout, unless they are there.

    Writes train2017/, val2017/, test2017/ and annotations/captions_*.json, whose images have their true scene under
    "scene". A split's annotations are written after its pictures, so an interrupted split is drawn again.
    Raises UserError, and writes nothing, if the folder holds anything else.
    """
    recipe = {"drawn": "scenes", "seed": seed, "version": 3}
    missing = {split: size for split, size in sizes.items() if not already_drawn(directory, split, recipe, size)}
    (directory / "annotations").mkdir(parents=True, exist_ok=True)
    for split, size in missing.items():
        annotations = directory / "annotations" / f"captions_{SPLITS[split]}.json"
        folder = directory / SPLITS[split]
        folder.mkdir(exist_ok=True)
        images: list[dict[str, Any]] = []
        captions: list[dict[str, Any]] = []
        for index in tqdm(range(size), f"drawing {split}", unit="scene"):
            scene, texts, rng = make_scene(seed, split, index)
            name = f"{index:012d}.png"
            (folder / name).unlink(missing_ok=True)
            with (folder / name).open("xb") as file:  # follows no link
                draw(scene, rng).save(file, "PNG", compress_level=1)
            images.append({"id": index, "file_name": name, "height": SIDE, "width": SIDE, "scene": asdict(scene)})
            captions += [{"id": 5 * index + k, "image_id": index, "caption": text} for k, text in enumerate(texts)]
        write_text(annotations, json.dumps({"info": recipe, "images": images, "annotations": captions}))


# Scoring captions

_GROUP = re.compile(rf"\b({'|'.join(COUNTS)}) ({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})")


def parse_caption(caption: str) -> Scene | None:
    """The scene that a caption states, or None if it does not state a complete one, word for word."""
    text = caption.strip().lower().rstrip(".")
    groups = tuple(Group(COUNTS[count], size, colour, shape) for count, size, colour, shape in _GROUP.findall(text))
    for where in PLACES if len(groups) == 1 else RELATIONS if len(groups) == 2 else ():
        scene = Scene(groups, where)
        if text in scene.statements():
            return scene
    return None


def scene_from_dict(values: dict[str, Any]) -> Scene:
    """The inverse of dataclasses.asdict."""
    return Scene(tuple(Group(**group) for group in values["groups"]), values["where"])


def mark(truth: Scene, caption: str) -> dict[str, bool]:
    """Which attributes a caption states correctly: count, size, colour, shape (of every group), where, and `all`.

    Two groups may be described from either one.
    """
    stated = parse_caption(caption)
    names = ("count", "size", "colour", "shape")
    if stated is None or len(stated.groups) != len(truth.groups):
        return dict.fromkeys((*names, "where", "all"), False)

    def compare(version: Scene) -> dict[str, bool]:
        pairs = list(zip(version.groups, truth.groups, strict=True))
        marks = {name: all(getattr(a, name) == getattr(b, name) for a, b in pairs) for name in names}
        marks["where"] = version.where == truth.where
        return marks | {"all": all(marks.values())}

    return max((compare(stated), compare(stated.inverse)), key=lambda marks: sum(marks.values()))


def score_scenes(truths: Sequence[Scene], captions: Sequence[str]) -> dict[str, float]:
    """Shares of captions with every attribute correct: over all scenes, those with one group and those with two."""
    right = [mark(truth, caption)["all"] for truth, caption in zip(truths, captions, strict=True)]

    def share(groups: int | None) -> float:
        chosen = [r for r, truth in zip(right, truths, strict=True) if groups in (None, len(truth.groups))]
        return sum(chosen) / max(1, len(chosen))

    return {"scene_accuracy": share(None), "scene_accuracy_one_group": share(1), "scene_accuracy_two_groups": share(2)}
