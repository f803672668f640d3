"""The mini world: procedural 64 px images whose every detail is known.

Ten objects; every image shows one of them together with one value of each of the nine patterns of MMVP-VLM
(orientation, presence, state, quantity, spatial relation, colour, structure, text, camera). All ten choices are
independent. Place, scale, background and pixel noise are nuisance: no caption names them.

A scene is an integer row `[object, orientation, ..., camera]` (10 entries). Image `i` of a set is a pure function of
`(WORLD_SEED, set, i)`, so the eleven sets can be made again anywhere, in any order, and never share an image.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

from pipeline.benchmarks.pairs import PROMPT

WORLD_SEED = 2407
SIZE = 64
CANVAS = 2 * SIZE  # images are drawn at twice the size and averaged down: that is the anti-aliasing

# One set per purpose; nothing is scored on an image that something was trained on.
# The generators take a name's place in this list, so a new name goes to its end.
SETS = (
    "image tower", "denoiser", "post-training", "probe", "scorings", "dev", "test", "encoder", "dev 3", "test 3",
    "ladder",
)  # fmt: skip

OBJECTS = ("fish", "car", "boat", "bird", "house", "cup", "key", "tree", "snail", "plane")
PATTERNS: dict[str, tuple[str, ...]] = {
    "Orientation": ("facing left", "facing right"),
    "Presence": ("without a hat", "wearing a hat"),
    "State": ("whole", "broken"),
    "Quantity": ("with one ball", "with two balls", "with three balls"),
    "Spatial": ("star on the left", "star on the right", "star above"),
    "Color": ("red", "green", "blue", "yellow"),
    "Structural Character": ("plain", "striped", "spotted"),
    "Text": ("letter A", "letter X", "letter O", "letter E"),
    "Camera Perspective": ("seen near", "seen far"),
}
CARDINALITIES = (len(OBJECTS), *(len(values) for values in PATTERNS.values()))
SEGMENTS = ("background", "object", "hat", "star", "balls", "letter")  # of a mask, by the value of its pixels

_INK = (40, 35, 45)
_FILL = ((205, 50, 45), (50, 150, 70), (50, 90, 205), (225, 185, 40))
_BALL, _STAR, _CARD, _HAT = (120, 60, 160), (240, 120, 20), (250, 250, 250), (90, 60, 40)

# Shapes in object coordinates, x right and y down, about [-1, 1]; every object faces right and is visibly asymmetric.
# ("e", x0, y0, x1, y1) is an ellipse, ("p", x, y, ...) a polygon, ("o", x0, y0, x1, y1, width) a ring.
_BODY: dict[str, tuple[tuple, ...]] = {
    "fish": (("e", -0.6, -0.5, 1.0, 0.5), ("p", -1.0, -0.55, -1.0, 0.55, -0.4, 0.0)),
    "car": (("p", -1.0, 0.0, 1.0, 0.1, 1.0, 0.5, -1.0, 0.5), ("p", -0.8, 0.1, -0.7, -0.55, 0.1, -0.55, 0.4, 0.1)),
    "boat": (("p", -0.8, 0.2, 1.1, 0.0, 0.6, 0.75, -0.6, 0.75), ("p", 0.15, -1.0, 0.15, 0.1, -0.75, 0.1)),
    "bird": (("e", -0.6, -0.35, 0.6, 0.55), ("e", 0.25, -0.75, 0.85, -0.15), ("p", -1.1, -0.4, -0.3, -0.1, -0.4, 0.3)),
    "house": (
        ("p", -0.7, -0.1, 0.7, -0.1, 0.7, 0.8, -0.7, 0.8),
        ("p", -0.95, -0.1, 0.0, -0.8, 0.95, -0.1),
        ("p", 0.4, -0.9, 0.65, -0.9, 0.65, -0.2, 0.4, -0.2),
    ),
    "cup": (("p", -0.8, -0.6, 0.4, -0.6, 0.25, 0.75, -0.65, 0.75), ("o", 0.1, -0.4, 0.95, 0.4, 0.17)),
    "key": (
        ("o", -1.0, -0.45, -0.1, 0.45, 0.25),
        ("p", -0.2, -0.14, 1.0, -0.14, 1.0, 0.14, -0.2, 0.14),
        ("p", 0.75, 0.1, 1.0, 0.1, 1.0, 0.55, 0.75, 0.55),
        ("p", 0.35, 0.1, 0.55, 0.1, 0.55, 0.45, 0.35, 0.45),
    ),
    "tree": (("e", -0.75, -1.0, 0.45, 0.15), ("e", 0.2, -0.35, 1.0, 0.15)),
    "snail": (
        ("e", -0.85, -0.65, 0.35, 0.5),
        ("p", -1.0, 0.3, 0.9, 0.3, 0.7, 0.65, -1.0, 0.65),
        ("p", 0.5, 0.5, 0.65, -0.45, 0.95, -0.45, 0.9, 0.5),
    ),
    "plane": (
        ("e", -1.0, -0.2, 1.0, 0.25),
        ("p", -1.0, -0.75, -0.7, -0.75, -0.4, 0.0, -0.9, 0.0),
        ("p", -0.1, 0.0, 0.4, 0.0, -0.2, 0.75, -0.5, 0.75),
    ),
}
_DETAIL: dict[str, tuple[tuple, ...]] = {
    "fish": (("e", 0.55, -0.28, 0.75, -0.08),),
    "car": (("e", -0.75, 0.3, -0.25, 0.8), ("e", 0.3, 0.3, 0.8, 0.8)),
    "boat": (("p", 0.15, -1.0, 0.23, -1.0, 0.23, 0.2, 0.15, 0.2),),
    "bird": (("p", 0.8, -0.55, 1.15, -0.42, 0.8, -0.3), ("e", 0.5, -0.6, 0.65, -0.45)),
    "house": (("p", -0.5, 0.25, -0.2, 0.25, -0.2, 0.8, -0.5, 0.8),),
    "cup": (),
    "key": (),
    "tree": (("p", -0.25, 0.1, 0.0, 0.1, 0.0, 0.95, -0.25, 0.95), ("p", -0.05, 0.3, 0.5, 0.05, 0.5, 0.15, -0.05, 0.45)),
    "snail": (("o", -0.55, -0.4, 0.1, 0.25, 0.1), ("e", 0.72, -0.4, 0.86, -0.26)),
    "plane": (("e", 0.55, -0.12, 0.75, 0.06),),
}
_LETTER = {  # strokes in the unit square
    0: ((0.0, 1.0, 0.5, 0.0), (0.5, 0.0, 1.0, 1.0), (0.2, 0.65, 0.8, 0.65)),
    1: ((0.0, 0.0, 1.0, 1.0), (1.0, 0.0, 0.0, 1.0)),
    2: ((0.0, 0.0, 1.0, 0.0), (1.0, 0.0, 1.0, 1.0), (1.0, 1.0, 0.0, 1.0), (0.0, 1.0, 0.0, 0.0)),
    3: ((0.0, 0.0, 0.0, 1.0), (0.0, 0.0, 1.0, 0.0), (0.0, 0.5, 0.8, 0.5), (0.0, 1.0, 1.0, 1.0)),
}


@dataclass(frozen=True)
class Nuisance:
    """What no caption names: object centre (canvas px), scale, two background colours, horizon (canvas px)."""

    x: float
    y: float
    scale: float
    sky: tuple[int, int, int]
    ground: tuple[int, int, int]
    horizon: float

    @classmethod
    def sample(cls, rng: np.random.Generator) -> "Nuisance":
        tints = rng.integers(175, 236, 6)
        return cls(
            x=CANVAS / 2 + rng.uniform(-7, 7),
            y=58 + rng.uniform(-5, 5),
            scale=rng.uniform(0.93, 1.07),
            sky=(int(tints[0]), int(tints[1]), int(tints[2])),
            ground=(int(tints[3]), int(tints[4]), int(tints[5])),
            horizon=rng.uniform(70, 90),
        )

    def jitter(self, rng: np.random.Generator) -> "Nuisance":
        """The same place a moment later: shifted by at most one and a half pixels of the finished image."""
        return replace(self, x=self.x + rng.uniform(-3, 3), y=self.y + rng.uniform(-3, 3))


def rng_of(set_name: str, *index: int) -> np.random.Generator:
    """The generator of one image (or one group of images) of a set. Raises ValueError for an unknown set.

    It is numpy's, as the images are drawn without torch; SETS is its list, as PURPOSES of core/compute.py is of others.
    """
    return np.random.default_rng([WORLD_SEED, SETS.index(set_name), *index])


def draw_scene(rng: np.random.Generator) -> np.ndarray:
    """One scene, int64 `[object, nine details]`, all independent and uniform."""
    return rng.integers(0, CARDINALITIES)


def any_details(rng: np.random.Generator) -> np.ndarray:
    """A random subset of the nine patterns; every size from 0 to 9 is equally likely."""
    return rng.permutation(9)[: rng.integers(0, 10)]


def caption(scene: np.ndarray, details: Iterable[int] = range(9)) -> str:
    """What `scene` shows: always its object, and the details (0..8, the patterns' order) that are asked for."""
    phrases = [list(PATTERNS.values())[i][scene[1 + i]] for i in sorted(details)]
    return " ".join([f"{PROMPT}a {OBJECTS[scene[0]]}", *phrases])


def render(scene: np.ndarray, nuisance: Nuisance, rng: np.random.Generator) -> np.ndarray:
    """The image of a scene, uint8 [64, 64, 3]; `rng` is used for the pixel noise only."""
    pixels = np.asarray(_draw(scene, nuisance)[0].reduce(2), np.float32)
    noise = rng.standard_normal(pixels.shape, np.float32) * 5
    return np.clip(np.rint(pixels + noise), 0, 255).astype(np.uint8)


def mask(scene: np.ndarray, nuisance: Nuisance) -> np.ndarray:
    """Which of SEGMENTS each of its pixels shows, uint8 [64, 64]: most of its four dots do, of ties the front."""
    dots = np.asarray(_draw(scene, nuisance)[1]).reshape(SIZE, 2, SIZE, 2)
    counts = np.stack([(dots == i).sum((1, 3)) for i in range(len(SEGMENTS))])
    return (len(SEGMENTS) - 1 - counts[::-1].argmax(0)).astype(np.uint8)  # what is in front has the larger number


def _draw(scene: np.ndarray, nuisance: Nuisance) -> tuple[Image.Image, Image.Image]:
    """A scene at twice its size: (in RGB, and which of SEGMENTS each dot shows)."""
    name = OBJECTS[scene[0]]
    facing, hat, broken, balls, star, colour, structure, letter, far = (int(v) for v in scene[1:])
    mirror = 1 if facing == 1 else -1
    radius = nuisance.scale * (20 if far else 33)

    def px(x: float, y: float) -> tuple[float, float]:
        return nuisance.x + mirror * radius * x, nuisance.y + radius * y

    def paint(pen: ImageDraw.ImageDraw, shapes: tuple[tuple, ...], fill) -> None:
        for kind, *numbers in shapes:
            points = [px(x, y) for x, y in zip(numbers[0::2], numbers[1::2], strict=False)]
            if kind == "p":
                pen.polygon(points, fill=fill)
                continue
            (x0, y0), (x1, y1) = points[:2]
            box = (min(x0, x1), y0, max(x0, x1), y1)
            if kind == "e":
                pen.ellipse(box, fill=fill)
            else:
                pen.ellipse(box, outline=fill, width=max(2, round(radius * numbers[4])))

    canvas = Image.new("RGB", (CANVAS, CANVAS), nuisance.sky)
    pen = ImageDraw.Draw(canvas)
    pen.rectangle((0, nuisance.horizon, CANVAS, CANVAS), fill=nuisance.ground)
    behind = canvas.copy()
    segments = Image.new("L", canvas.size)
    label = ImageDraw.Draw(segments)

    body = Image.new("L", canvas.size)
    paint(ImageDraw.Draw(body), _BODY[name], 255)
    skin = Image.new("RGB", canvas.size, _FILL[colour])
    skin_pen, shade = ImageDraw.Draw(skin), tuple(v * 2 // 5 for v in _FILL[colour])
    if structure == 1:
        for k in range(-4, 5):
            (x0, y0), (x1, y1) = px(k * 0.32 - 0.07, -1.2), px(k * 0.32 + 0.07, 1.2)
            skin_pen.rectangle((min(x0, x1), y0, max(x0, x1), y1), fill=shade)
    elif structure == 2:
        for i in range(-3, 4):
            for j in range(-3, 4):
                x, y = px(i * 0.34 + 0.17 * (j % 2), j * 0.3)
                skin_pen.ellipse((x - 0.1 * radius, y - 0.1 * radius, x + 0.1 * radius, y + 0.1 * radius), fill=shade)
    canvas.paste(skin, mask=body)
    segments.paste(SEGMENTS.index("object"), mask=body)
    paint(pen, _DETAIL[name], _INK)
    paint(label, _DETAIL[name], SEGMENTS.index("object"))
    if broken:  # a zigzag gap through which the background shows
        gap = Image.new("L", canvas.size)
        crack = [px(x, y) for x, y in ((0.15, -1.2), (-0.1, -0.4), (0.2, 0.0), (-0.1, 0.4), (0.1, 1.2))]
        ImageDraw.Draw(gap).line(crack, fill=255, width=max(4, round(radius * 0.22)))
        canvas.paste(behind, mask=gap)
        segments.paste(SEGMENTS.index("background"), mask=gap)
    if hat:
        brim = [px(-0.55, -0.75), px(0.55, -0.75), px(0.55, -0.92), px(-0.55, -0.92)]
        crown = [px(-0.32, -0.9), px(0.32, -0.9), px(0.32, -1.35), px(-0.32, -1.35)]
        for points in (brim, crown):
            pen.polygon(points, fill=_HAT)
            label.polygon(points, fill=SEGMENTS.index("hat"))

    star_x, star_y = ((nuisance.x - 50, 52), (nuisance.x + 50, 52), (nuisance.x, 9))[star]
    angles = np.arange(10) * np.pi / 5 - np.pi / 2
    reach = np.where(np.arange(10) % 2 == 0, 9.0, 4.0)
    tips = zip(star_x + reach * np.cos(angles), star_y + reach * np.sin(angles), strict=True)
    star_shape = [(float(x), float(y)) for x, y in tips]
    pen.polygon(star_shape, fill=_STAR)
    label.polygon(star_shape, fill=SEGMENTS.index("star"))
    for k in range(balls + 1):
        ball = (62 + 21 * k - 8, 102, 62 + 21 * k + 8, 118)
        pen.ellipse(ball, fill=_BALL)
        label.ellipse(ball, fill=SEGMENTS.index("balls"))
    pen.rectangle((6, 92, 34, 124), fill=_CARD)
    label.rectangle((6, 92, 34, 124), fill=SEGMENTS.index("letter"))  # with the card that it stands on
    for x0, y0, x1, y1 in _LETTER[letter]:
        pen.line((12 + 16 * x0, 98 + 20 * y0, 12 + 16 * x1, 98 + 20 * y1), fill=_INK, width=4)
    return canvas, segments


def image(set_name: str, *index: int) -> tuple[np.ndarray, np.ndarray]:
    """Image `index` of a set: (uint8 [64, 64, 3], its scene)."""
    rng = rng_of(set_name, *index)
    scene = draw_scene(rng)
    return render(scene, Nuisance.sample(rng), rng), scene


def segmented(set_name: str, *index: int) -> tuple[np.ndarray, np.ndarray]:
    """The same image, and which of SEGMENTS each pixel shows: (uint8 [64, 64, 3], uint8 [64, 64])."""
    rng = rng_of(set_name, *index)
    scene, nuisance = draw_scene(rng), Nuisance.sample(rng)
    return render(scene, nuisance, rng), mask(scene, nuisance)


def pair(pattern: int, index: int, set_name: str = "scorings") -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Two images of a scene that differ in `pattern` alone, but for a small shift and fresh noise; their scenes."""
    rng = rng_of(set_name, 0, pattern, index)
    first, nuisance = draw_scene(rng), Nuisance.sample(rng)
    second = first.copy()
    values = CARDINALITIES[1 + pattern]
    second[1 + pattern] = (first[1 + pattern] + rng.integers(1, values)) % values
    return [render(first, nuisance, rng), render(second, nuisance.jitter(rng), rng)], [first, second]
