"""Scenes with circles, squares, triangles and stars, drawn from a seed: every pixel's object is known.

A scene's background has a smooth texture, a few lines and grain; its objects differ in size, proportions, rotation, colour
and shading, overlap, and may reach over the border. Each shows at least 60 % of itself.

Shapes: S side of the picture, N objects.
"""

import math
from typing import NamedTuple

import cv2
import numpy as np

CLASSES = ("circle", "square", "triangle", "star")
LEAST_SEEN = 0.6  # of an object's area
SUBPIXEL = 4  # OpenCV draws at 1/16 of a pixel


class Scene(NamedTuple):
    """A picture and what is in it."""

    image: np.ndarray  # (S, S, 3) uint8
    instances: np.ndarray  # (S, S) uint8: 0 background, i the i-th object
    labels: np.ndarray  # (N,) int64: its class
    boxes: np.ndarray  # (N, 4) float32: x1, y1, x2, y2 around the pixels that are seen of it


def draw_scene(rng: np.random.Generator, size: int, least: int, most: int) -> Scene:
    """Draw a scene of `size` x `size` pixels with `least` to `most` objects.

    (Where it is too full for another object there are fewer, but not fewer than `least`, unless that is absurdly many.)
    """
    background, base = _background(rng, size)
    image, instances = background, np.zeros((size, size), np.uint8)
    areas, labels = [], []  # whole areas, also of what lies beneath others or beyond the border
    for i in range(rng.integers(least, most + 1)):
        for _ in range(8 if i >= least else 1000):
            label = int(rng.integers(len(CLASSES)))
            outline = _outline(rng, label, size)
            coverage = _cover(outline, size)  # (S, S), 0 to 1
            drawn = np.where(coverage >= 0.5, len(areas) + 1, instances).astype(np.uint8)
            seen = np.bincount(drawn.ravel(), minlength=len(areas) + 2)[1:]
            whole = np.array([*areas, cv2.contourArea(outline.astype(np.float32))])
            if (seen >= LEAST_SEEN * whole).all() and seen[-1] > 0:
                areas, instances = whole.tolist(), drawn
                labels.append(label)
                image = image + coverage[..., None] * (_colour(rng, base, size) - image)  # (S, S, 3)
                break
    grain = rng.standard_normal((size, size, 3), dtype=np.float32) * rng.uniform(3, 11)
    image = np.clip(image + grain, 0, 255).astype(np.uint8)
    boxes = [cv2.boundingRect((instances == i + 1).astype(np.uint8)) for i in range(len(areas))]  # x, y, w, h
    corners = np.array([(x, y, x + w, y + h) for x, y, w, h in boxes], np.float32).reshape(-1, 4)
    return Scene(image, instances, np.array(labels, np.int64), corners)


def _outline(rng: np.random.Generator, label: int, size: int) -> np.ndarray:
    """Return the corners (P, 2) of an object, in pixels: x, y."""
    radius = size * rng.uniform(0.085, 0.24)
    stretch = math.sqrt(rng.uniform(0.7, 1 / 0.7))  # of its axes
    name = CLASSES[label]
    if name == "circle":
        angles, radii = np.linspace(0, 2 * np.pi, 40, endpoint=False), 0.9
    elif name == "square":
        angles, radii = np.pi / 4 + np.arange(4) * np.pi / 2, 1.1
    elif name == "triangle":
        angles, radii = np.pi / 2 + np.arange(3) * 2 * np.pi / 3, 1.2
    else:
        angles, radii = np.arange(10) * np.pi / 5, np.tile([1.2, 0.52], 5)
    points = np.stack([np.cos(angles) * stretch, np.sin(angles) / stretch], axis=1) * np.reshape(radii, (-1, 1))
    turn = rng.uniform(0, 2 * np.pi)
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    centre = rng.uniform(0.4 * radius, size - 0.4 * radius, 2)
    return centre + radius * points @ rotation.T


def _cover(outline: np.ndarray, size: int) -> np.ndarray:
    """Return the share of each pixel that lies within the outline: (S, S) float32."""
    mask = np.zeros((size, size), np.uint8)
    # OpenCV's coordinates are those of pixels' middles
    corners = np.round((outline - 0.5) * 2**SUBPIXEL).astype(np.int32)
    cv2.fillPoly(mask, [corners], 255, lineType=cv2.LINE_AA, shift=SUBPIXEL)
    return mask.astype(np.float32) / 255


def _texture(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """Return smooth noise of so many cells a side: (S, S) float32, from about -1 to 1."""
    coarse = rng.uniform(-1, 1, (cells, cells)).astype(np.float32)
    return cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)


def _background(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a background (S, S, 3) float32, and its mean colour (3,)."""
    base = rng.uniform(40, 215, 3).astype(np.float32)
    texture = sum(_texture(rng, size, cells) * weight for cells, weight in ((3, 1.0), (7, 0.6), (20, 0.4)))
    image = base + texture[..., None] * rng.uniform(-22, 22, 3).astype(np.float32)
    for _ in range(rng.integers(0, 5)):  # lines, which are no objects
        ends = rng.integers(-size // 8, size + size // 8, 4).tolist()
        colour = (base + rng.uniform(-60, 60, 3)).tolist()
        image = np.ascontiguousarray(image)
        cv2.line(image, ends[:2], ends[2:], colour, int(rng.integers(1, 3)), cv2.LINE_AA)
    return image, base


def _colour(rng: np.random.Generator, base: np.ndarray, size: int) -> np.ndarray:
    """Return an object's shaded surface (S, S, 3) float32, of a colour that differs from the background's mean."""
    while True:
        colour = rng.uniform(15, 240, 3).astype(np.float32)
        if np.linalg.norm(colour - base) >= 75:
            break
    shade = _texture(rng, size, 3) * rng.uniform(0, 16)
    return colour + shade[..., None]
