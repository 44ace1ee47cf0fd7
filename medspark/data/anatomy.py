"""The body of a CT phantom: where the organs are, of what HU, and how they vary by seed.

Body units (see `Canvas`): half the body is 1 wide; z = 0 is the top of the diaphragm. Organs share
the body's measures and one contrast phase, so that a hidden one can be guessed from the others.
HU of tissues: textbook values at 120 kV, rounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from medspark.data.canvas import Box, Canvas, Point, smooth_noise

LABELS = (
    "air", "skin", "fat", "muscle", "bone", "lung", "airway", "heart", "vessel", "liver",
    "spleen", "kidney", "stomach", "bowel", "bladder", "table", "lesion",
)  # fmt: skip
(AIR, SKIN, FAT, MUSCLE, BONE, LUNG, AIRWAY, HEART, VESSEL, LIVER,
 SPLEEN, KIDNEY, STOMACH, BOWEL, BLADDER, TABLE, LESION) = range(len(LABELS))  # fmt: skip

# SD in HU of each tissue's texture (structure that quantum noise does not explain).
TEXTURE = np.array([0, 8, 14, 9, 45, 32, 3, 5, 4, 6, 5, 6, 5, 12, 2, 15, 10], dtype=np.float32)


@dataclass(frozen=True)
class Body:
    """What differs between people and scans; body units and HU.

    Attributes:
        depth: Half the front-to-back depth.
        fat: Thickness of the fat under the skin.
        wall: Thickness of muscle and ribs.
        dome: Height of the diaphragm's domes over its rim.
        scale: Size of the abdominal organs.
        blood: HU of blood, higher with contrast agent.
        uptake: Contrast in organs, as a fraction of that in blood.
        bone: HU of cortical bone.
        gas: Chance of gas in a piece of bowel.
    """

    depth: float
    fat: float
    wall: float
    dome: float
    scale: float
    blood: float
    uptake: float
    bone: float
    gas: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Body:
        """A random person in a random contrast phase."""
        fat = rng.uniform(0.04, 0.15)
        contrast = 0.0 if rng.random() < 0.35 else rng.uniform(60, 220)
        return cls(
            depth=rng.uniform(0.62, 0.70) + 0.4 * (fat - 0.08),
            fat=fat,
            wall=rng.uniform(0.08, 0.12),
            dome=rng.uniform(0.18, 0.30),
            scale=rng.uniform(0.9, 1.1),
            blood=45 + contrast,
            uptake=rng.uniform(0.2, 0.45),
            bone=rng.uniform(550, 900),
            gas=rng.uniform(0.15, 0.6),
        )

    def organ(self, plain: float, share: float = 1.0) -> float:
        """HU of an organ: without contrast `plain`, else more by its share of the uptake."""
        return plain + (self.blood - 45) * self.uptake * share

    @property
    def cavity(self) -> tuple[float, float]:
        """Half width and half depth of what the ribs and abdominal wall enclose."""
        inner = self.fat + self.wall
        return 0.96 - inner, self.depth - inner


def draw_body(canvas: Canvas, body: Body, rng: np.random.Generator) -> None:
    """Draw table, torso and organs. Later shapes cover earlier ones."""
    _table(canvas, body, rng)
    cavity = _torso(canvas, body)
    under_skin = cavity - body.wall - body.fat + 0.04
    above = _diaphragm(canvas, body)
    _abdomen(canvas, body, np.maximum(cavity, above), rng)
    _thorax(canvas, body, np.maximum(cavity, -above), rng)
    _spine(canvas, body, under_skin)
    _ribs(canvas, body)
    _pelvis(canvas, body)
    _great_vessels(canvas, body)


def _whole(canvas: Canvas) -> Box:
    return slice(0, canvas.size[0]), slice(0, canvas.size[1]), slice(0, canvas.size[2])


def _table(canvas: Canvas, body: Body, rng: np.random.Generator) -> None:
    top = body.depth + 0.035
    width = rng.uniform(0.7, 0.95)
    # Straight in z and not warped with the body: the table is a machine's part.
    straight_y = canvas.y.mean(axis=(0, 2), keepdims=True)
    straight_x = canvas.x.mean(axis=(0, 1), keepdims=True)
    below = straight_y - (top - 0.10 * (straight_x / width) ** 2)
    side = np.abs(straight_x) - width
    box = _whole(canvas)
    for inset, hu in ((0.0, -150.0), (0.018, -880.0)):
        shape = np.maximum(np.maximum(-below + inset, below - 0.13 + inset), side + inset)
        canvas.blend(box, np.broadcast_to(shape, canvas.size), hu, TABLE)


def _ring(canvas: Canvas, half_width: float, half_depth: float) -> np.ndarray:
    """Signed distance to an elliptic cylinder along z."""
    sx, sy = canvas.x / half_width, canvas.y / half_depth
    norm = np.sqrt(sx * sx + sy * sy)
    slope = np.sqrt((sx / half_width) ** 2 + (sy / half_depth) ** 2)
    return norm * (norm - 1) / np.maximum(slope, 1e-6)


def _torso(canvas: Canvas, body: Body) -> np.ndarray:
    """Skin, fat, muscle and the fat inside; returns the signed distance to the cavity."""
    box = _whole(canvas)
    waist = 0.04 * np.cos(2.2 * canvas.z)
    outer = _ring(canvas, 0.96, body.depth) - waist
    canvas.blend(box, outer, 25, SKIN)
    canvas.blend(box, outer + max(0.018, canvas.pitch), -105, FAT)
    canvas.blend(box, outer + body.fat, 52, MUSCLE)
    cavity = outer + body.fat + body.wall
    canvas.blend(box, cavity, -98, FAT)
    for side in (-1, 1):  # muscles beside the spine
        back = body.cavity[1] + 0.02
        canvas.tube(
            [(side * 0.17, back, -3), (side * 0.17, back, 3)],
            0.13,
            50,
            MUSCLE,
            clip=outer + body.fat,
        )
        canvas.tube(
            [(side * 0.16, body.depth - 0.3, -0.7), (side * 0.33, body.depth - 0.4, -1.7)],
            [0.05, 0.13], 54, MUSCLE,
        )  # fmt: skip
    return cavity


def _diaphragm(canvas: Canvas, body: Body) -> np.ndarray:
    """Signed distance, negative below the diaphragm: two domes over a rim that falls backwards."""
    right = 1 - ((canvas.x + 0.42) ** 2 + (canvas.y + 0.05) ** 2) / 0.42
    left = 1 - ((canvas.x - 0.42) ** 2 + (canvas.y + 0.05) ** 2) / 0.42
    dome = np.maximum(right, left * 0.8)
    return canvas.z - body.dome * np.clip(dome, -1.5, 1)


def _abdomen(canvas: Canvas, body: Body, space: np.ndarray, rng: np.random.Generator) -> None:
    s, half_depth = body.scale, body.cavity[1]
    _bowel(canvas, body, space, rng)
    inside = space + 0.03
    canvas.ellipsoid((0.62, 0.16, -0.2), (0.2 * s, 0.3 * s, 0.34 * s),
                     body.organ(48, 1.2), SPLEEN, clip=inside)  # fmt: skip
    canvas.ellipsoid((0.3, -0.18, -0.22), (0.3 * s, 0.26 * s, 0.36 * s), 38, STOMACH, clip=inside)
    level = rng.uniform(-0.25, -0.1)  # gas lies in front in someone on the back, flat below
    canvas.ellipsoid((0.3, -0.18, -0.22), (0.26 * s, 0.22 * s, 0.32 * s), 12, STOMACH, clip=inside)
    canvas.ellipsoid((0.3, -0.18, -0.22), (0.26 * s, 0.22 * s, 0.32 * s), -950, STOMACH,
                     clip=np.maximum(inside, canvas.y - level))  # fmt: skip
    liver = body.organ(58)
    canvas.ellipsoid((-0.42, 0.0, -0.22), (0.56 * s, 0.56 * s, 0.5 * s), liver, LIVER, clip=inside)
    canvas.ellipsoid((0.0, -0.28, -0.12), (0.45 * s, 0.25 * s, 0.26 * s), liver, LIVER, clip=inside)
    in_liver = np.where(canvas.labels == LIVER, -1.0, 1.0).astype(np.float32) * canvas.pitch
    portal = (-0.15, 0.08, -0.38)
    for aim in ((-0.9, -0.1, 0.25), (-0.6, 0.6, 0.1), (-0.7, -0.5, -0.3)):
        tree = vessel_tree(portal, aim, 0.24 * s, 0.045, 5, rng)
        for a, b, ra, rb in tree:
            canvas.tube([a, b], [ra, rb], liver + 0.3 * (body.blood - 45) - 8, -1, clip=in_liver)
    for side in (-1, 1):
        _kidney(canvas, body, (side * 0.4, half_depth - 0.22, -0.82 + 0.04 * side), side)
    canvas.tube([(-0.2, 0.06, -0.62), (0.05, 0.0, -0.55), (0.32, 0.1, -0.45), (0.5, 0.14, -0.35)],
                [0.085, 0.06, 0.055, 0.04], body.organ(40), MUSCLE, clip=inside)  # fmt: skip


def _kidney(canvas: Canvas, body: Body, centre: Point, side: int) -> None:
    s = body.scale
    x, y, z = centre
    canvas.ellipsoid(centre, (0.15 * s, 0.15 * s, 0.29 * s), body.organ(32, 2.2), KIDNEY)
    canvas.ellipsoid((x - side * 0.02, y, z), (0.09 * s, 0.085 * s, 0.2 * s),
                     body.organ(30, 1.2), KIDNEY)  # fmt: skip
    canvas.ellipsoid((x - side * 0.09, y - 0.02, z), (0.08 * s, 0.05 * s, 0.1 * s), -70, FAT)


def _bowel(canvas: Canvas, body: Body, space: np.ndarray, rng: np.random.Generator) -> None:
    """Colon as a frame, small bowel as a random walk inside it."""
    width, depth = body.cavity
    w, d = 0.78 * width, 0.45 * depth
    frame: list[Point] = [(-w, 0.1, -1.9), (-w, 0.02, -0.75), (-0.3, -d, -0.7), (0.3, -d, -0.65),
                          (w, 0.02, -0.6), (w, 0.12, -1.9)]  # fmt: skip
    loops: list[Point] = [(0.0, -0.1, -0.9)]
    for _ in range(46):
        step = rng.normal(0, 0.17, 3) + 0.25 * (np.array([0, -0.12, -1.25]) - loops[-1])
        x, y, z = np.clip(
            loops[-1] + step, [-0.6 * width, -0.75 * depth, -1.9], [0.6 * width, 0.2, -0.75]
        )
        loops.append((float(x), float(y), float(z)))
    for path, radius, wall in ((loops, 0.075, 0.022), (_dense(frame, 6), 0.10, 0.018)):
        for a, b in pairwise(path):
            canvas.tube([a, b], radius, body.organ(38, 0.8), BOWEL, clip=space + 0.01)
            gas = rng.random() < body.gas * (1.2 if a[1] < 0 else 0.5)
            inner = -900.0 if gas else rng.uniform(0, 40)
            canvas.tube([a, b], radius - wall, inner, BOWEL, clip=space + 0.01 + wall)


def _dense(points: list[Point], pieces: int) -> list[Point]:
    """A polyline with each side cut into pieces."""
    at = np.linspace(0, len(points) - 1, (len(points) - 1) * pieces + 1)
    columns = [np.interp(at, np.arange(len(points)), [p[i] for p in points]) for i in range(3)]
    return [(float(x), float(y), float(z)) for x, y, z in zip(*columns, strict=True)]


def vessel_tree(
    start: Point,
    aim: Point,
    length: float,
    radius: float,
    depth: int,
    rng: np.random.Generator,
) -> list[tuple[Point, Point, float, float]]:
    """Segments (from, to, radius, radius) of a random tree that forks `depth` times."""
    heading = np.array(aim) / np.linalg.norm(aim)
    end = np.array(start) + length * heading
    tip: Point = (float(end[0]), float(end[1]), float(end[2]))
    segments = [(start, tip, radius, 0.8 * radius)]
    if depth > 0:
        across = np.cross(heading, rng.normal(size=3))
        across /= np.linalg.norm(across) + 1e-9
        for turn in (rng.uniform(0.3, 0.8), -rng.uniform(0.3, 0.9)):
            fork = heading + turn * across + rng.normal(0, 0.1, 3)
            shorter, thinner = length * rng.uniform(0.68, 0.9), radius * rng.uniform(0.65, 0.8)
            child = (float(fork[0]), float(fork[1]), float(fork[2]))
            segments += vessel_tree(tip, child, shorter, thinner, depth - 1, rng)
    return segments


def _thorax(canvas: Canvas, body: Body, space: np.ndarray, rng: np.random.Generator) -> None:
    width, depth = body.cavity
    for side in (-1, 1):
        centre = (side * 0.5 * width, 0.04, 0.35)
        radii = (0.5 * width - 0.05, depth - 0.02, 1.15)
        air = -860 + rng.uniform(-20, 30)
        canvas.ellipsoid(centre, radii, air, LUNG, clip=space + 0.02)
    in_lung = np.where(canvas.labels == LUNG, -1.0, 1.0).astype(np.float32) * canvas.pitch
    for side in (-1, 1):
        hilum = (side * 0.2, 0.1, 0.55)
        for aim in ((1, 0.1, 1.0), (1, -0.7, 0.2), (0.8, 0.7, -0.2), (0.7, 0.2, -1.0)):
            heading = (side * aim[0], aim[1], aim[2])
            for a, b, ra, rb in vessel_tree(hilum, heading, 0.21, 0.042, 5, rng):
                canvas.tube([a, b], [ra, rb], body.blood - 10, -1, clip=in_lung)
    _heart(canvas, body, space)
    wind: list[Point] = [(0.0, 0.1, 2.0), (0.0, 0.12, 0.72)]
    for radius, hu, label in ((0.075, 20.0, MUSCLE), (0.055, -990.0, AIRWAY)):
        canvas.tube(wind, radius, hu, label)
        for side in (-1, 1):
            canvas.tube([wind[1], (side * 0.24, 0.14, 0.5), (side * 0.36, 0.16, 0.3)],
                        [0.8 * radius, 0.6 * radius, 0.4 * radius], hu, label)  # fmt: skip


def _heart(canvas: Canvas, body: Body, space: np.ndarray) -> None:
    front = -0.3 * body.cavity[1]
    canvas.ellipsoid((0.12, front, 0.28), (0.42, 0.34, 0.4), -85, FAT, clip=space)
    canvas.ellipsoid((0.14, front, 0.28), (0.37, 0.29, 0.35), body.organ(45), HEART, clip=space)
    canvas.ellipsoid((0.24, front + 0.03, 0.22), (0.17, 0.14, 0.2), body.blood, HEART, clip=space)
    canvas.ellipsoid((-0.02, front - 0.02, 0.28), (0.15, 0.16, 0.22), body.blood, HEART, clip=space)


def _great_vessels(canvas: Canvas, body: Body) -> None:
    back = body.depth - 0.38
    aorta: list[Point] = [(0.05, back, -1.5), (0.07, back, -0.4), (0.13, back, 0.5),
                          (0.15, back - 0.02, 0.85), (0.08, back - 0.15, 1.02),
                          (-0.02, back - 0.32, 0.9), (0.02, back - 0.42, 0.55)]  # fmt: skip
    canvas.tube(aorta, [0.055, 0.065, 0.075, 0.08, 0.085, 0.09, 0.09], body.blood, VESSEL)
    cava: list[Point] = [
        (-0.1, back - 0.02, -1.5),
        (-0.12, back - 0.06, -0.3),
        (-0.1, back - 0.2, 0.2),
    ]
    canvas.tube(cava, [0.06, 0.07, 0.075], 0.5 * (body.blood + 45), VESSEL)
    for side in (-1, 1):
        canvas.tube(
            [(0.05 * side, back, -1.5), (side * 0.3, back - 0.2, -2.1)], 0.045, body.blood, VESSEL
        )
    canvas.tube([(-0.12, back - 0.3, 0.5), (-0.14, back - 0.3, 1.3)], 0.05, body.blood, VESSEL)


def _spine(canvas: Canvas, body: Body, clip: np.ndarray) -> None:
    pitch, y = 0.2, body.depth - 0.26
    for z in np.arange(-2.6, 2.4, pitch):
        radius = float(0.105 - 0.014 * z)
        canvas.ellipsoid((0, y, z + pitch / 2), (radius, radius * 0.85, 0.05), 85, MUSCLE)
        for shrink, hu in ((0.0, 0.75 * body.bone), (0.022, 0.3 * body.bone)):
            body_radii = (radius - shrink, 0.88 * radius - shrink, 0.088 - 0.8 * shrink)
            canvas.ellipsoid((0, y, float(z)), _squarer(body_radii), hu, BONE)
            for side in (-1, 1):
                canvas.tube([(side * 0.07, y + 0.08, z), (side * 0.09, y + 0.15, z),
                             (side * 0.2, y + 0.17, z + 0.02)],
                            [0.036 - shrink * 0.7, 0.036 - shrink * 0.7, 0.028 - shrink * 0.8],
                            hu, BONE)  # fmt: skip
            canvas.tube(
                [(0, y + 0.17, z), (0, y + 0.27, z - 0.07)],
                0.034 - shrink * 0.7,
                hu,
                BONE,
                clip=clip,
            )
        canvas.ellipsoid((0, y + 0.125, float(z)), (0.052, 0.045, 0.12), 28, MUSCLE)


def _squarer(radii: Point) -> Point:
    # An ellipsoid stands for a cylinder of the same height: wider, to fill its corners.
    return radii[0] * 1.08, radii[1] * 1.08, radii[2] * 1.1


def _ribs(canvas: Canvas, body: Body) -> None:
    half_width, half_depth = (extent + 0.35 * body.wall for extent in body.cavity)
    angles = np.linspace(0.22, 2.55, 13)
    for number, z in enumerate(np.arange(1.5, -0.9, -0.2)):
        last = len(angles) if number < 9 else 13 - 3 * (number - 8)
        drop = 0.42 if number > 1 else 0.2
        for side in (-1, 1):
            points: list[Point] = [
                (float(side * half_width * np.sin(t)), float(half_depth * np.cos(t)),
                 float(z - drop * (1 - np.cos(t)) / 1.4)) for t in angles[:last]
            ]  # fmt: skip
            canvas.tube(points, 0.036, 0.8 * body.bone, BONE)
            canvas.tube(points, 0.018, 0.35 * body.bone, BONE)
    front = -half_depth + 0.01
    for radius, hu in ((0.05, 0.6 * body.bone), (0.032, 0.25 * body.bone)):
        canvas.tube([(-0.04, front, 0.15), (-0.04, front, 1.1)], radius, hu, BONE)
        canvas.tube([(0.04, front, 0.15), (0.04, front, 1.1)], radius, hu, BONE)


def _pelvis(canvas: Canvas, body: Body) -> None:
    y = body.depth - 0.35
    canvas.ellipsoid((0, -0.15, -2.05), (0.26, 0.22, 0.2), 6, BLADDER)
    for side in (-1, 1):
        blade: list[Point] = [(side * 0.22, y + 0.12, -1.75), (side * 0.5, y - 0.05, -1.55),
                              (side * 0.68, y - 0.35, -1.65)]  # fmt: skip
        lower: list[Point] = [(side * 0.25, y + 0.1, -2.1), (side * 0.5, y - 0.1, -2.1),
                              (side * 0.6, y - 0.35, -2.1)]  # fmt: skip
        for radius, hu in ((0.055, body.bone), (0.033, 0.3 * body.bone)):
            for share in np.linspace(0, 1, 8):
                line = [tuple((1 - share) * np.array(a) + share * np.array(b))
                        for a, b in zip(blade, lower, strict=True)]  # fmt: skip
                canvas.tube([(p[0], p[1], p[2]) for p in line], radius, hu, BONE)


def add_texture(canvas: Canvas, noise_sd: float, rng: np.random.Generator) -> None:
    """Tissue texture at two scales, then quantum noise with the short correlation of a kernel."""
    fine = smooth_noise(canvas.size, 1.6, rng)
    coarse = smooth_noise(canvas.size, 5.0, rng)
    canvas.hu += TEXTURE[canvas.labels] * (0.7 * fine + 0.7 * coarse)
    noise = smooth_noise(canvas.size, 1.0, rng)
    canvas.hu += noise_sd * noise
