"""What the built-in data set draws, as data: species with their field marks, scenes and flowers.

Wings are given for the right side: x points away from the body, y towards the tail, and the forewing is about 1 long.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RGB = tuple[int, int, int]
Curve = tuple[tuple[float, float], ...]  # control points (x, y)


@dataclass(frozen=True)
class Band:
    """An area along the outer margin: from `along[0]` to `along[1]` of it, between two fractions of the way out.

    `inner` and `outer` are given at the start, middle and end of the stretch (1 is the margin itself).
    """

    colour: RGB
    inner: tuple[float, float, float]
    outer: tuple[float, float, float]
    along: tuple[float, float] = (-0.1, 1.1)


@dataclass(frozen=True)
class Spots:
    """Round spots or eyes at `places` (along the margin, fraction out), each of concentric (radius, colour) rings."""

    places: Curve
    rings: tuple[tuple[float, RGB], ...]


@dataclass(frozen=True)
class Veins:
    """Lines from the root to the margin."""

    colour: RGB
    width: float
    count: int = 7


Mark = Band | Spots | Veins


@dataclass(frozen=True)
class Wing:
    """One wing: a smooth closed outline that starts at the root, and what is painted on it, in order."""

    outline: Curve
    margin: tuple[int, int]  # the control points of the outline between which the outer margin lies
    ground: tuple[RGB, ...]  # colours from the root to the margin
    marks: tuple[Mark, ...]
    costa: RGB | None = None  # the leading edge
    scallops: tuple[int, float] = (0, 0.0)  # how many waves the margin has, and how deep


@dataclass(frozen=True)
class Species:
    """One species; another one is another entry of `SPECIES`."""

    name: str
    fore: Wing
    hind: Wing
    body: RGB
    stripe: RGB
    plump: float = 1.0  # thickness of the body
    feathered: bool = False  # antennae: feathered as of moths, or clubbed


@dataclass(frozen=True)
class Scene:
    """A kind of place: the colours far behind, those of its leaves, and the share of flowers among its plants."""

    far: tuple[RGB, ...]
    leaves: tuple[RGB, ...]
    flowers: float


def row(count: int, out: float, start: float = 0.08, end: float = 0.92) -> Curve:
    """`count` places in a row along the margin, each `out` of the way out."""
    return tuple((float(t), out) for t in np.linspace(start, end, count))


# The formatter would give every number pair of these tables a line of its own.
# fmt: off
BLACK, INK, WHITE, CREAM = (22, 18, 20), (46, 36, 34), (246, 244, 238), (246, 228, 158)
ANGLED_FORE = ((0.02, 0.0), (0.34, -0.37), (0.68, -0.6), (0.88, -0.64), (0.9, -0.52), (0.8, -0.36), (0.8, -0.14),
               (0.68, 0.1), (0.34, 0.14))
SMOOTH_FORE = ((0.02, 0.0), (0.32, -0.33), (0.66, -0.58), (0.86, -0.62), (0.92, -0.5), (0.86, -0.24),
               (0.7, 0.06), (0.36, 0.13))
ROUND_HIND = ((0.02, 0.02), (0.34, 0.0), (0.6, 0.08), (0.72, 0.3), (0.66, 0.54), (0.46, 0.72), (0.22, 0.74),
              (0.07, 0.5))
BLUE_FORE = ((0.02, 0.0), (0.3, -0.32), (0.58, -0.52), (0.74, -0.5), (0.76, -0.36), (0.7, -0.12), (0.56, 0.1),
             (0.28, 0.14))
BLUE_HIND = ((0.02, 0.02), (0.3, 0.04), (0.52, 0.12), (0.6, 0.32), (0.53, 0.52), (0.35, 0.64), (0.17, 0.62),
             (0.06, 0.44))

SPECIES = (
    Species(
        "brimstone",
        Wing(
            ((0.02, 0.0), (0.32, -0.36), (0.64, -0.58), (0.86, -0.66), (0.92, -0.66), (0.86, -0.54), (0.8, -0.3),
             (0.66, 0.06), (0.34, 0.14)),
            (4, 7), ((214, 206, 58), (240, 226, 62), (232, 220, 84)),
            (Veins((200, 192, 70), 0.012, 8), Spots(((0.3, 0.56),), ((0.045, (224, 120, 30)),))),
            costa=(214, 170, 70),
        ),
        Wing(
            ((0.02, 0.02), (0.34, 0.0), (0.58, 0.08), (0.66, 0.28), (0.64, 0.42), (0.68, 0.54), (0.54, 0.58),
             (0.4, 0.7), (0.2, 0.7), (0.07, 0.48)),
            (2, 8), ((220, 212, 90), (238, 226, 80), (226, 216, 96)),
            (Veins((204, 196, 78), 0.012, 8), Spots(((0.5, 0.5),), ((0.05, (226, 124, 34)),))),
        ),
        (96, 88, 66), (170, 160, 110),
    ),
    Species(
        "cinnabar moth",
        Wing(
            ((0.02, 0.0), (0.34, -0.3), (0.68, -0.5), (0.9, -0.54), (0.94, -0.44), (0.86, -0.18), (0.72, 0.04),
             (0.36, 0.12)),
            (3, 6), ((58, 54, 62), (66, 62, 68), (54, 50, 58)),
            (Band((206, 34, 52), (0.16, 0.16, 0.16), (0.9, 0.9, 0.9), (0.0, 0.17)),
             Spots(((0.36, 0.86), (0.86, 0.84)), ((0.075, (208, 36, 54)),))),
        ),
        Wing(ROUND_HIND, (2, 6), ((190, 30, 50), (212, 40, 60), (204, 36, 54)),
             (Band((54, 46, 54), (0.93, 0.93, 0.93), (1.1, 1.1, 1.1)),)),
        (40, 36, 42), (40, 36, 42), 1.25, False,
    ),
    Species(
        "common blue",
        Wing(BLUE_FORE, (3, 6), ((84, 96, 196), (104, 118, 224), (120, 134, 232)),
             (Veins((86, 98, 196), 0.012), Band(INK, (0.93, 0.95, 0.95), (1.1, 1.1, 1.1)),
              Band(WHITE, (0.965, 0.97, 0.97), (1.1, 1.1, 1.1))), costa=(170, 180, 236)),
        Wing(BLUE_HIND, (2, 6), ((84, 96, 196), (108, 122, 226), (120, 134, 232)),
             (Veins((86, 98, 196), 0.012), Band(INK, (0.92, 0.94, 0.94), (1.1, 1.1, 1.1)),
              Band(WHITE, (0.955, 0.96, 0.96), (1.1, 1.1, 1.1)))),
        (70, 76, 110), (120, 128, 170), 0.9,
    ),
    Species(
        "holly blue",
        Wing(BLUE_FORE, (3, 6), ((112, 130, 216), (132, 152, 232), (140, 160, 236)),
             (Veins((112, 128, 208), 0.012), Band((40, 38, 56), (0.66, 0.8, 0.88), (1.1, 1.1, 1.1)),
              Band(WHITE, (0.97, 0.97, 0.97), (1.1, 1.1, 1.1))), costa=(70, 70, 96)),
        Wing(BLUE_HIND, (2, 6), ((112, 130, 216), (136, 156, 234), (150, 168, 238)),
             (Veins((112, 128, 208), 0.012), Spots(row(6, 0.87), ((0.034, (44, 42, 60)),)),
              Band(WHITE, (0.96, 0.96, 0.96), (1.1, 1.1, 1.1)))),
        (88, 92, 112), (150, 156, 180), 0.9,
    ),
    Species(
        "luna moth",
        Wing(
            ((0.02, 0.0), (0.32, -0.34), (0.62, -0.54), (0.86, -0.6), (0.94, -0.56), (0.82, -0.34), (0.74, -0.08),
             (0.66, 0.14), (0.32, 0.16)),
            (4, 7), ((206, 228, 184), (176, 218, 150), (184, 222, 162)),
            (Veins((150, 196, 128), 0.012), Band((214, 206, 120), (0.95, 0.96, 0.96), (1.1, 1.1, 1.1)),
             Spots(((0.16, 0.6),), ((0.06, (120, 60, 70)), (0.045, (232, 214, 120)), (0.02, (60, 50, 60))))),
            costa=(128, 52, 74),
        ),
        Wing(
            ((0.02, 0.02), (0.32, 0.04), (0.56, 0.14), (0.64, 0.34), (0.52, 0.6), (0.4, 0.84), (0.44, 1.12),
             (0.5, 1.32), (0.36, 1.34), (0.26, 1.08), (0.22, 0.8), (0.12, 0.56)),
            (2, 9), ((204, 228, 182), (180, 220, 154), (194, 224, 164)),
            (Spots(((0.2, 0.6),), ((0.065, (110, 60, 70)), (0.048, (232, 214, 120)), (0.02, (60, 50, 60)))),),
        ),
        (222, 214, 192), (196, 184, 156), 1.5, True,
    ),
    Species(
        "monarch",
        Wing(
            ((0.02, 0.0), (0.36, -0.34), (0.76, -0.58), (1.0, -0.6), (1.04, -0.48), (0.88, -0.24), (0.76, -0.04),
             (0.66, 0.1), (0.34, 0.14)),
            (3, 7), ((206, 98, 22), (230, 122, 30), (236, 130, 36)),
            (Band(BLACK, (0.6, 0.78, 0.84), (1.1, 1.1, 1.1)), Veins(BLACK, 0.026, 7),
             Spots(row(8, 0.94, 0.04), ((0.022, WHITE),)),
             Spots(((0.06, 0.72), (0.2, 0.77), (0.34, 0.82)), ((0.04, (244, 190, 120)),))),
            costa=BLACK,
        ),
        Wing(ROUND_HIND, (2, 6), ((210, 104, 26), (234, 128, 34), (236, 134, 40)),
             (Veins(BLACK, 0.022, 8), Band(BLACK, (0.84, 0.84, 0.84), (1.1, 1.1, 1.1)),
              Spots(row(9, 0.93, 0.04), ((0.024, WHITE),)))),
        BLACK, (60, 54, 54),
    ),
    Species(
        "painted lady",
        Wing(
            SMOOTH_FORE, (3, 6), ((150, 98, 62), (226, 128, 66), (230, 136, 76)),
            (Band(BLACK, (0.56, 0.68, 0.9), (1.1, 1.1, 1.1), (-0.1, 1.1)),
             Band(BLACK, (0.38, 0.42, 0.5), (0.5, 0.54, 0.56), (-0.1, 0.3)),
             Band(BLACK, (0.56, 0.6, 0.62), (0.66, 0.72, 0.7), (0.3, 0.66)),
             Spots(((0.04, 0.68), (0.22, 0.76), (0.12, 0.86), (0.36, 0.84), (0.46, 0.88)), ((0.034, WHITE),)),
             Spots(((0.72, 0.66), (0.88, 0.62)), ((0.04, BLACK),))),
        ),
        Wing(ROUND_HIND, (2, 6), ((156, 104, 66), (228, 134, 70), (230, 140, 80)),
             (Band(INK, (0.26, 0.4, 0.4), (0.4, 0.5, 0.56), (0.0, 0.4)), Spots(row(5, 0.76, 0.14), ((0.044, BLACK),)),
              Spots(row(7, 0.93, 0.04), ((0.036, INK),))), scallops=(6, 0.03)),
        (120, 86, 58), (90, 64, 46),
    ),
    Species(
        "peacock",
        Wing(
            ANGLED_FORE, (3, 7), ((112, 42, 30), (170, 52, 34), (164, 50, 34)),
            (Band((84, 66, 60), (0.93, 0.92, 0.92), (1.1, 1.1, 1.1)),
             Band(BLACK, (0.44, 0.46, 0.5), (0.62, 0.58, 0.54), (-0.15, 0.18)),
             Spots(((0.2, 0.78),), ((0.17, (238, 206, 120)), (0.135, BLACK), (0.1, (104, 100, 190)),
                                    (0.05, (190, 60, 60)))),
             Spots(((0.56, 0.8), (0.74, 0.76)), ((0.024, (206, 210, 236)),))),
            costa=(90, 66, 50), scallops=(3, 0.03),
        ),
        Wing(ROUND_HIND, (2, 6), ((100, 44, 34), (150, 50, 36), (110, 70, 58)),
             (Band((92, 72, 64), (0.88, 0.88, 0.88), (1.1, 1.1, 1.1)),
              Spots(((0.24, 0.72),), ((0.19, (204, 186, 150)), (0.155, BLACK), (0.1, (96, 116, 206)),
                                      (0.04, BLACK)))), scallops=(6, 0.045)),
        (70, 44, 36), (50, 34, 30),
    ),
    Species(
        "red admiral",
        Wing(
            ANGLED_FORE, (3, 7), ((72, 52, 44), (38, 28, 30), (28, 22, 26)),
            (Band((222, 66, 34), (0.42, 0.56, 0.8), (0.56, 0.7, 0.94), (-0.15, 1.0)),
             Band(WHITE, (0.7, 0.72, 0.72), (0.77, 0.8, 0.8), (-0.1, 0.14)),
             Spots(((0.1, 0.87), (0.22, 0.88), (0.33, 0.9)), ((0.03, WHITE),))),
        ),
        Wing(ROUND_HIND, (2, 6), ((76, 56, 46), (42, 32, 32), (30, 24, 28)),
             (Band((222, 70, 36), (0.8, 0.8, 0.82), (0.97, 0.97, 0.97), (0.16, 0.95)),
              Spots(row(4, 0.87, 0.3, 0.86), ((0.026, BLACK),)),
              Spots(((0.98, 0.9),), ((0.04, (80, 110, 200)),))), scallops=(6, 0.03)),
        (40, 30, 30), (70, 52, 46),
    ),
    Species(
        "swallowtail",
        Wing(
            SMOOTH_FORE, (3, 6), ((60, 52, 40), (240, 222, 130), (244, 226, 140)),
            (Veins(BLACK, 0.024, 7), Band(BLACK, (0.36, 0.4, 0.42), (0.46, 0.48, 0.5), (-0.15, 0.42)),
             Band(BLACK, (0.62, 0.62, 0.62), (0.7, 0.68, 0.68), (-0.15, 0.26)),
             Band(BLACK, (0.82, 0.82, 0.82), (1.1, 1.1, 1.1)), Spots(row(7, 0.93, 0.05), ((0.034, CREAM),))),
            costa=BLACK,
        ),
        Wing(
            ((0.02, 0.02), (0.34, 0.0), (0.6, 0.1), (0.68, 0.32), (0.62, 0.52), (0.56, 0.64), (0.62, 0.86),
             (0.66, 1.0), (0.56, 1.0), (0.46, 0.76), (0.26, 0.72), (0.08, 0.5)),
            (2, 10), ((236, 218, 126), (244, 228, 144), (240, 222, 134)),
            (Veins(BLACK, 0.018, 8), Band(BLACK, (0.7, 0.72, 0.72), (1.1, 1.1, 1.1)),
             Spots(row(5, 0.79, 0.08, 0.5), ((0.05, (84, 112, 190)),)),
             Spots(row(4, 0.92, 0.06, 0.36), ((0.034, CREAM),)),
             Spots(((0.95, 0.8),), ((0.075, BLACK), (0.062, (214, 64, 44))))),
        ),
        (50, 44, 36), (226, 208, 120),
    ),
)

SCENES = (
    Scene(((70, 110, 50), (110, 150, 70), (50, 84, 44), (150, 178, 96)),
          ((88, 140, 54), (60, 108, 46), (136, 170, 76)), 0.4),
    Scene(((30, 56, 36), (46, 78, 48), (70, 100, 60), (22, 38, 30)),
          ((50, 96, 52), (74, 120, 60), (36, 70, 44)), 0.25),
    Scene(((170, 150, 96), (140, 116, 70), (196, 180, 124), (112, 96, 60)),
          ((176, 152, 84), (128, 124, 62), (196, 120, 50)), 0.3),
    Scene(((92, 72, 56), (70, 54, 44), (120, 98, 76), (54, 46, 40)),
          ((150, 84, 40), (110, 70, 48), (96, 112, 58)), 0.2),
    Scene(((120, 96, 140), (150, 130, 160), (90, 100, 90), (176, 150, 176)),
          ((104, 130, 84), (84, 104, 84), (140, 110, 150)), 0.5),
    Scene(((150, 176, 200), (120, 150, 176), (176, 196, 204), (110, 140, 110)),
          ((96, 140, 84), (130, 166, 120), (70, 110, 90)), 0.35),
)
FLOWERS = ((226, 206, 84), (222, 132, 62), (196, 62, 54), (118, 116, 206), (146, 160, 222), (232, 228, 216),
           (190, 104, 160), (180, 206, 152), (146, 60, 46), (236, 190, 124), (70, 52, 66))
# fmt: on
