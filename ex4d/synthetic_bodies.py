"""Moving textured bodies of a procedural scene: ray casting of spheres, boxes and a room, and solid textures.

Everything here is exact and vectorised over rays. Lengths are in the scene's unit, time in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ex4d.geometry.camera import FOV_DEG

NUM_WAVES = 8
HIT_EPSILON = 1e-9
FACES_PER_BODY = 6
SKY_SCALE = 60.0
ROOM_DISTANCE = 3.0  # usual distance of walls, in scales
PALETTE = {
    "red": (0.78, 0.22, 0.18),
    "green": (0.22, 0.62, 0.28),
    "blue": (0.20, 0.34, 0.76),
    "yellow": (0.82, 0.72, 0.22),
    "purple": (0.56, 0.26, 0.66),
    "orange": (0.84, 0.48, 0.16),
    "white": (0.80, 0.80, 0.78),
    "grey": (0.42, 0.44, 0.46),
}


@dataclass(frozen=True)
class Body:
    """One moving solid.

    Args:
        kind: "sphere", "box", or "room" (a box seen from inside, which never moves).
        centre: float64 [3], mean position of its path, world coordinates.
        half: float64 [3], half extents; a sphere uses half[0] as its radius.
        sway: float64 [3], amplitude of the sinusoidal path along each axis.
        period_s: float64 [3], period of the path along each axis.
        phase: float64 [3], radians.
        axis: float64 [3], unit axis of its rotation.
        spin: rotation speed, radians per second, and start angle, radians.
        name: words for the caption.
    """

    kind: str
    centre: np.ndarray
    half: np.ndarray
    sway: np.ndarray
    period_s: np.ndarray
    phase: np.ndarray
    axis: np.ndarray
    spin: tuple[float, float]
    name: str

    def position(self, time_s: float) -> np.ndarray:
        """Return the body's centre at a time, float64 [3], world coordinates."""
        return self.centre + self.sway * np.sin(2 * np.pi * time_s / self.period_s + self.phase)

    def rotation(self, time_s: float) -> np.ndarray:
        """Return the rotation body-to-world at a time, float64 [3,3] (Rodrigues' formula)."""
        angle = self.spin[1] + self.spin[0] * time_s
        x, y, z = self.axis
        cross = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
        return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross

    def to_local(self, points: np.ndarray, time_s: float) -> np.ndarray:
        """Transform world points [N,3] to the body's own coordinates at a time."""
        return (points - self.position(time_s)) @ self.rotation(time_s)

    def intersect(self, origins: np.ndarray, directions: np.ndarray, time_s: float) -> np.ndarray:
        """Return the ray parameter of the first hit, float64 [N], inf if there is none.

        Args:
            origins: [N,3] or [1,3], world; directions: [N,3], world, any length.
        """
        local_origins = self.to_local(origins, time_s)
        local_directions = directions @ self.rotation(time_s)
        if self.kind == "sphere":
            return _hit_sphere(local_origins, local_directions, float(self.half[0]))
        with np.errstate(divide="ignore", invalid="ignore"):  # the slab method
            inverse = 1.0 / local_directions
            middle, reach = -local_origins * inverse, np.abs(self.half * inverse)
        near, far = np.nanmax(middle - reach, axis=1), np.nanmin(middle + reach, axis=1)
        if self.kind == "room":
            return far
        return np.where((near <= far) & (near > HIT_EPSILON), near, np.inf)

    def normal_and_face(self, local: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the outward normals in body coordinates [N,3] and face numbers int [N] (0..5; 0 for a sphere)."""
        if self.kind == "sphere":
            return local / self.half[0], np.zeros(len(local), dtype=np.int64)
        scaled = local / self.half
        axis = np.argmax(np.abs(scaled), axis=1)
        sign = np.sign(np.take_along_axis(scaled, axis[:, None], axis=1))[:, 0]
        normals = np.zeros_like(local)
        normals[np.arange(len(local)), axis] = sign
        return normals, 2 * axis + (sign > 0)


def _hit_sphere(origins: np.ndarray, directions: np.ndarray, radius: float) -> np.ndarray:
    a = np.einsum("nc,nc->n", directions, directions)
    b = np.sum(origins * directions, axis=1)
    c = np.sum(origins * origins, axis=1) - radius**2
    discriminant = b * b - a * c
    distance = (-b - np.sqrt(np.maximum(discriminant, 0.0))) / a
    return np.where((discriminant >= 0) & (distance > HIT_EPSILON), distance, np.inf)


@dataclass(frozen=True)
class Textures:
    """Solid textures of all faces of a scene: for each, a base colour plus plane waves in body coordinates.

    Args:
        base: float32 [S,3], linear mix of 0..1 RGB.
        waves: float32 [S,K,3], radians per unit length: spatial frequency vectors in body coordinates.
        phase: float32 [S,K], radians.
        tint: float32 [S,K,3], amplitude of each wave in RGB.
    """

    base: np.ndarray
    waves: np.ndarray
    phase: np.ndarray
    tint: np.ndarray

    def colour(self, face: np.ndarray, local: np.ndarray) -> np.ndarray:
        """Return RGB float32 [N,3], about 0..1, at body points [N,3] of faces int [N]."""
        points = local.astype(np.float32)
        angle = np.einsum("nkc,nc->nk", self.waves[face], points) + self.phase[face]
        return self.base[face] + np.einsum("nk,nkc->nc", np.sin(angle), self.tint[face])


def random_textures(
    rng: np.random.Generator, bases: np.ndarray, cycles_per_unit: np.ndarray, contrast: float
) -> Textures:
    """Draw textures whose waves stay below a spatial frequency.

    Args:
        bases: [S,3] base colours, 0..1.
        cycles_per_unit: [S], highest frequency of each face's waves, cycles per unit length.
        contrast: standard deviation of a texture, in units of the range 0..1.
    """
    count = len(bases)
    direction = rng.normal(size=(count, NUM_WAVES, 3))
    direction /= np.linalg.norm(direction, axis=2, keepdims=True)
    # Evenly spread over the upper 7/8 of the band, so that each face has both coarse and fine structure.
    share = rng.uniform(0.125, 1.0, size=(count, NUM_WAVES, 1))
    waves = 2 * np.pi * direction * share * cycles_per_unit[:, None, None]
    grey = rng.normal(size=(count, NUM_WAVES, 1))
    tint = 0.8 * grey + 0.6 * rng.normal(size=(count, NUM_WAVES, 3))
    tint *= contrast * np.sqrt(2.0 / NUM_WAVES)
    phase = rng.uniform(0, 2 * np.pi, size=(count, NUM_WAVES))
    return Textures(*(array.astype(np.float32) for array in (bases, waves, phase, tint)))


def random_bodies(rng: np.random.Generator, scale: float, moving: bool) -> list[Body]:
    """Draw the hero at the pivot, a small companion beside it, and bodies outside the orbit's circle."""
    side = rng.choice([-1.0, 1.0])
    hero = np.array([rng.uniform(-0.08, 0.08), rng.uniform(-0.04, 0.10), 1.15])
    companion = np.array([side * rng.uniform(0.36, 0.44), rng.uniform(-0.2, 0.2), rng.uniform(1.15, 1.35)])
    places = [(hero, rng.uniform(0.20, 0.27), 0.12), (companion, rng.uniform(0.09, 0.13), 0.12)]
    start = rng.uniform(-42, -22)
    for number in range(int(rng.integers(2, 5))):
        azimuth = np.radians(start + 26 * number + rng.uniform(-6, 6))  # 0 is straight behind the pivot
        size = rng.uniform(0.22, 0.40)
        reach = rng.uniform(1.45, 1.9) + size
        place = np.array([reach * np.sin(azimuth), rng.uniform(-0.45, 0.35), 1.0 + reach * np.cos(azimuth)])
        places.append((place, size, 0.2))
    return [_random_body(rng, scale * place, scale * size, scale * sway, moving) for place, size, sway in places]


def _random_body(rng: np.random.Generator, centre: np.ndarray, size: float, sway: float, moving: bool) -> Body:
    kind = str(rng.choice(["sphere", "box"]))
    axis = rng.normal(size=3)
    half = np.full(3, size) if kind == "sphere" else size * rng.uniform(0.6, 0.8, size=3)
    motion, spin = sway * rng.uniform(0.3, 1.0, size=3), rng.uniform(0.3, 1.3) * rng.choice([-1, 1])
    return Body(
        kind=kind,
        centre=centre,
        half=half,
        sway=motion * moving,
        period_s=rng.uniform(1.2, 3.0, size=3),
        phase=rng.uniform(0, 2 * np.pi, size=3),
        axis=axis / np.linalg.norm(axis),
        spin=(float(spin) * moving, float(rng.uniform(0, 2 * np.pi))),
        name=f"{rng.choice(list(PALETTE))} {kind}",
    )


def random_room(rng: np.random.Generator, scale: float, sky: bool) -> Body:
    """Draw the room around everything, which does not move; with a sky, walls and ceiling are far away."""
    floor, ceiling = rng.uniform(0.75, 1.0) * scale, rng.uniform(1.5, 2.0) * scale
    # Narrow, so that both side walls are in the first picture and what a turn uncovers has a colour seen before.
    side, depth = rng.uniform(1.45, 1.75) * scale, rng.uniform(2.9, 3.4) * scale
    if sky:
        side, depth, ceiling = SKY_SCALE * scale, SKY_SCALE * scale, SKY_SCALE * scale
    centre = np.array([0.0, (floor - ceiling) / 2, scale])
    half = np.array([side, (floor + ceiling) / 2, depth])
    still = np.zeros(3)
    return Body("room", centre, half, still, np.ones(3), still, np.array([0.0, 1.0, 0.0]), (0.0, 0.0), "room")


def paint(
    rng: np.random.Generator, bodies: list[Body], scale: float, max_frequency: float, sky: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Draw base colours [S,3] and highest frequencies [S] (cycles per unit length) of all faces."""
    focal_heights = 0.5 / np.tan(np.radians(FOV_DEG) / 2)
    bases, cycles = [], []
    for body in bodies:
        if body.kind == "room":
            colours = rng.uniform(0.30, 0.75, size=(FACES_PER_BODY, 3))
            distance = ROOM_DISTANCE * scale
        else:
            colours = np.array(PALETTE[body.name.split()[0]]) * rng.uniform(0.75, 1.15, size=(FACES_PER_BODY, 1))
            distance = max(float(np.linalg.norm(body.centre)), 0.5 * scale)
        band = np.full(FACES_PER_BODY, max_frequency * focal_heights / distance)
        if sky and body.kind == "room":
            colours[[0, 1, 2, 4, 5]] = (0.55, 0.68, 0.82)
            band[[0, 1, 2, 4, 5]] /= SKY_SCALE / ROOM_DISTANCE
        bases.append(colours)
        cycles.append(band)
    return np.concatenate(bases), np.concatenate(cycles)
