"""Renders scenes and sentences about them, the pretraining data of the embedded checkpoint.

A scene is one or two colored objects on a light background. The sentences name, locate, count and compare the objects,
or make true or false statements about them. They do not use the questions or images of easy-VQA.
"""

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

IMAGE_SIZE = 64  # pixels per side
PATCH_SIZE = 8  # pixels per side
MIN_SIDE, MAX_SIDE = 8, 34  # pixels per side of a bounding box
LARGE_AREA = 400  # pixels of a bounding box above which an object is called large
MAX_JITTER = 24  # of a color channel, out of 255

SHAPES = ("circle", "rectangle", "triangle", "cross", "ring", "star")
COLORS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "teal": (0, 128, 128),
    "brown": (165, 42, 42),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "orange": (255, 150, 0),
    "purple": (128, 0, 128),
    "pink": (255, 105, 180),
}
COLOR_NAMES = tuple(COLORS)
COUNTS = ("none", "one", "two")


@dataclass(frozen=True)
class Thing:
    """One object of a scene. `box` is (left, top, right, bottom) in pixels."""

    shape: str
    color: str
    box: tuple[int, int, int, int]

    @property
    def name(self) -> str:
        """Color and shape."""
        return f"{self.color} {self.shape}"

    @property
    def place(self) -> str:
        """Corner of the image, such as "top left"."""
        left, top, right, bottom = self.box
        row = "top" if top + bottom < IMAGE_SIZE else "bottom"
        column = "left" if left + right < IMAGE_SIZE else "right"
        return f"{row} {column}"

    @property
    def area(self) -> int:
        """Area of the bounding box in pixels."""
        left, top, right, bottom = self.box
        return (right - left) * (bottom - top)


@dataclass(frozen=True)
class Scene:
    """A rendered scene. `pixels` is (64, 64, 3) uint8; `owner` is (64, 64) uint8: 0 for background, k for object k."""

    pixels: np.ndarray
    owner: np.ndarray
    things: tuple[Thing, ...]

    def patch_labels(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the majority shape and color of the object pixels of each patch.

        Both are (64,) int64, row by row: 0 for a patch of background only, else 1 + the index into `SHAPES` and
        `COLOR_NAMES`.
        """
        side = IMAGE_SIZE // PATCH_SIZE
        patches = self.owner.reshape(side, PATCH_SIZE, side, PATCH_SIZE).swapaxes(1, 2).reshape(side * side, -1)
        counts = np.stack([(patches == k + 1).sum(1) for k in range(len(self.things))])
        winner = np.where(counts.sum(0) > 0, 1 + counts.argmax(0), 0)
        shape = np.array([0, *(1 + SHAPES.index(thing.shape) for thing in self.things)])
        color = np.array([0, *(1 + COLOR_NAMES.index(thing.color) for thing in self.things)])
        return shape[winner], color[winner]


def draw_scene(rng: random.Random) -> Scene:
    """Draw a scene of one object (with probability 0.7) or two that do not touch."""
    count = 1 if rng.random() < 0.7 else 2
    things: list[Thing] = []
    while len(things) < count:
        thing = Thing(rng.choice(SHAPES), rng.choice(COLOR_NAMES), _random_box(rng))
        if all(thing.name != other.name and not _touch(thing.box, other.box) for other in things):
            things.append(thing)
    scale = rng.choice((1, 1, 3))  # drawing at a larger scale and shrinking gives soft edges
    size = (IMAGE_SIZE * scale, IMAGE_SIZE * scale)
    image = Image.new("RGB", size, tuple(rng.randint(225, 255) for _ in range(3)))
    owner = Image.new("L", size, 0)
    for number, thing in enumerate(things, start=1):
        fill = tuple(min(255, max(0, c + rng.randint(-MAX_JITTER, MAX_JITTER))) for c in COLORS[thing.color])
        box = tuple(scale * edge for edge in thing.box)
        _draw(ImageDraw.Draw(image), thing.shape, box, fill)
        _draw(ImageDraw.Draw(owner), thing.shape, box, number)
    if scale > 1:
        image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
        owner = owner.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.NEAREST)
    return Scene(np.asarray(image), np.asarray(owner), tuple(sorted(things, key=lambda thing: thing.box)))


def sentence(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """Return a prompt and its continuation, which is true of the scene and begins with a space."""
    kind = rng.random()
    if kind < 0.25:
        return _caption(scene, rng)
    if kind < 0.75:
        return _statement(scene, rng)
    return _question(scene, rng)


def _caption(scene: Scene, rng: random.Random) -> tuple[str, str]:
    prompt = rng.choice(("A picture of", "This image shows", "Question: what do you see? Answer:"))
    return prompt, " " + " and ".join(_with_article(thing.name) for thing in scene.things)


def _statement(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """Return a statement about a color, a shape or both, possibly negated, and whether it is true."""
    color, shape = rng.choice(COLOR_NAMES), rng.choice(SHAPES)
    if rng.random() < 0.5:
        thing = rng.choice(scene.things)
        color, shape = thing.color, thing.shape
    form = rng.random()
    if form < 0.4:
        holds, noun = any(t.color == color for t in scene.things), rng.choice((f"{color} shape", f"{color} thing"))
    elif form < 0.8:
        holds, noun = any(t.shape == shape for t in scene.things), shape
    else:
        holds, noun = any((t.color, t.shape) == (color, shape) for t in scene.things), f"{color} {shape}"
    negated, noun_phrase = rng.random() < 0.5, _with_article(noun)
    text = rng.choice(
        (f"the image does not contain {noun_phrase}", f"there is no {noun}", f"{noun_phrase} is not here")
        if negated
        else (f"the image contains {noun_phrase}", f"there is {noun_phrase}", f"{noun_phrase} is here")
    )
    return f"True or false: {text}. Answer:", " true" if holds != negated else " false"


def _question(scene: Scene, rng: random.Random) -> tuple[str, str]:
    thing = rng.choice(scene.things)
    places = {other.place for other in scene.things}
    asked = [
        (f"where is the {thing.name}?", thing.place),
        ("how many things are there?", COUNTS[len(scene.things)]),
        (f"is the {thing.name} large?", "yes" if thing.area > LARGE_AREA else "no"),
    ]
    if len(places) == len(scene.things):
        asked.append((f"what is in the {thing.place} corner?", thing.name))
    if len(scene.things) == 1:
        asked.append(_choice(thing, rng))
    text, answer = rng.choice(asked)
    return f"Question: {text} Answer:", " " + answer


def _choice(thing: Thing, rng: random.Random) -> tuple[str, str]:
    correct, names = rng.choice(((thing.shape, SHAPES), (thing.color, COLOR_NAMES)))
    pair = [correct, rng.choice([name for name in names if name != correct])]
    rng.shuffle(pair)
    return f"{pair[0]} or {pair[1]}?", correct


def _with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _random_box(rng: random.Random) -> tuple[int, int, int, int]:
    width, height = rng.randint(MIN_SIDE, MAX_SIDE), rng.randint(MIN_SIDE, MAX_SIDE)
    if rng.random() < 0.6:
        height = width
    left, top = rng.randint(0, IMAGE_SIZE - width), rng.randint(0, IMAGE_SIZE - height)
    return left, top, left + width, top + height


def _touch(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return a[0] <= b[2] and b[0] <= a[2] and a[1] <= b[3] and b[1] <= a[3]


def _draw(draw: ImageDraw.ImageDraw, shape: str, box: tuple[int, ...], fill: Any) -> None:
    """Draw one shape into `box`; circle, ring, cross and star fill a square of its shorter side."""
    left, top, right, bottom = box[0], box[1], box[2] - 1, box[3] - 1
    if shape == "rectangle":
        draw.rectangle((left, top, right, bottom), fill=fill)
        return
    if shape == "triangle":
        draw.polygon(((left, bottom), (right, bottom), ((left + right) / 2, top)), fill=fill)
        return
    side = min(right - left, bottom - top)
    square = (left, top, left + side, top + side)
    if shape == "circle":
        draw.ellipse(square, fill=fill)
    elif shape == "ring":
        draw.ellipse(square, outline=fill, width=max(2, side // 5))
    elif shape == "cross":
        arm = max(2, side // 3)
        middle_x, middle_y = left + side / 2, top + side / 2
        draw.rectangle((left, middle_y - arm / 2, left + side, middle_y + arm / 2), fill=fill)
        draw.rectangle((middle_x - arm / 2, top, middle_x + arm / 2, top + side), fill=fill)
    else:
        draw.polygon(_star(left + side / 2, top + side / 2, side / 2), fill=fill)


def _star(x: float, y: float, radius: float) -> list[tuple[float, float]]:
    angles = np.pi / 5 * np.arange(10) - np.pi / 2
    radii = np.where(np.arange(10) % 2 == 0, radius, 0.4 * radius)
    return [(x + r * np.cos(a), y + r * np.sin(a)) for r, a in zip(radii, angles, strict=True)]
