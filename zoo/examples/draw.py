"""Draw the example pictures that are drawings: `python zoo/examples/draw.py`. The bytes are the same each time.

Each scene is painted at 768 x 768 on a canvas of 256 units a side, then reduced to 256 x 256 for smooth edges.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

UNITS, SCALE = 256, 3
Colour = tuple[int, int, int]
Points = Sequence[tuple[float, float]]


class Scene:
    """A canvas in units of 1/256 of its side, with (0, 0) at the top left."""

    def __init__(self, top: Colour, bottom: Colour, seed: int):
        self.rng = np.random.default_rng(seed)
        self.image = self._gradient(top, bottom, UNITS)

    def _gradient(self, top: Colour, bottom: Colour, height: float) -> Image.Image:
        t = np.linspace(0, 1, round(height * SCALE))[:, None, None]
        rows = np.asarray(top) * (1 - t) + np.asarray(bottom) * t
        return Image.fromarray(np.broadcast_to(rows, (len(t), UNITS * SCALE, 3)).astype(np.uint8))

    def band(self, above: float, top: Colour, bottom: Colour, grain: float = 0) -> None:
        """Ground or water: a gradient from `above` down to the bottom edge, with streaks of `grain` grey levels."""
        band = self._gradient(top, bottom, UNITS - above)
        if grain:
            coarse = self.rng.normal(0, grain, (band.height // 9 + 1, band.width // 40 + 1)).astype(np.float32)
            streaks = Image.fromarray(coarse).resize(band.size, Image.Resampling.BICUBIC)
            band = Image.fromarray((np.asarray(band) + np.asarray(streaks)[:, :, None]).clip(0, 255).astype(np.uint8))
        self.image.paste(band, (0, round(above * SCALE)))

    def shape(self, points: Points, fill: Colour) -> None:
        ImageDraw.Draw(self.image).polygon([(x * SCALE, y * SCALE) for x, y in points], fill=fill)

    def ellipse(self, x0: float, y0: float, x1: float, y1: float, fill: Colour) -> None:
        ImageDraw.Draw(self.image).ellipse([v * SCALE for v in (x0, y0, x1, y1)], fill=fill)

    def box(self, x0: float, y0: float, x1: float, y1: float, fill: Colour, radius: float = 0) -> None:
        ImageDraw.Draw(self.image).rounded_rectangle([v * SCALE for v in (x0, y0, x1, y1)], radius * SCALE, fill=fill)

    def line(self, points: Points, fill: Colour, width: float) -> None:
        points = [(x * SCALE, y * SCALE) for x, y in points]
        ImageDraw.Draw(self.image).line(points, fill, round(width * SCALE), "curve")

    def soft(self, x: float, y: float, width: float, height: float, fill: Colour, strength: float) -> None:
        """A blurred ellipse: a cloud or a shadow."""
        mask = Image.new("L", self.image.size)
        box = [v * SCALE for v in (x - width / 2, y - height / 2, x + width / 2, y + height / 2)]
        ImageDraw.Draw(mask).ellipse(box, fill=round(255 * strength))
        mask = mask.filter(ImageFilter.GaussianBlur(height * SCALE / 5))
        self.image.paste(fill, (0, 0), mask)

    def wheel(self, x: float, y: float, radius: float) -> None:
        rings = ((1, (24, 24, 27)), (0.58, (176, 180, 186)), (0.48, (112, 116, 124)), (0.16, (40, 42, 46)))
        for share, colour in rings:
            r = radius * share
            self.ellipse(x - r, y - r, x + r, y + r, colour)

    def save(self, path: Path) -> None:
        small = self.image.resize((UNITS, UNITS), Image.Resampling.LANCZOS)
        grain = self.rng.normal(0, 2.5, (UNITS, UNITS, 1))
        Image.fromarray((np.asarray(small) + grain).clip(0, 255).astype(np.uint8)).save(path, quality=88, optimize=True)


def airplane() -> Scene:
    s = Scene((70, 128, 196), (196, 222, 240), 1)
    for x, y, w in ((52, 196, 150), (190, 214, 170), (222, 62, 90)):
        s.soft(x, y, w, 26, (255, 255, 255), 0.75)
    s.shape([(150, 116), (92, 52), (112, 52), (186, 112)], (198, 204, 212))  # far wing
    s.shape([(52, 118), (26, 72), (46, 70), (84, 114)], (38, 84, 150))  # fin
    s.shape([(54, 132), (24, 118), (36, 114), (80, 124)], (205, 210, 218))
    s.shape([(34, 122), (60, 112), (188, 104), (222, 108), (240, 122), (226, 134), (190, 140), (70, 138)],
            (240, 243, 247))
    s.shape([(34, 122), (60, 130), (190, 132), (238, 124), (226, 134), (190, 140), (70, 138)], (188, 196, 207))
    s.shape([(212, 110), (222, 109), (231, 115), (218, 117)], (44, 56, 74))  # cockpit
    for x in range(84, 204, 9):
        s.ellipse(x, 116, x + 4, 120, (70, 86, 108))
    s.shape([(160, 130), (80, 196), (106, 194), (200, 132)], (214, 219, 226))  # near wing
    s.shape([(160, 130), (80, 196), (86, 196), (172, 132)], (164, 172, 184))
    s.box(128, 156, 158, 170, (150, 158, 170), 7)
    s.box(152, 157, 160, 169, (58, 66, 80), 4)
    s.box(104, 76, 126, 86, (160, 168, 180), 5)
    return s


def automobile() -> Scene:
    s = Scene((150, 190, 222), (226, 234, 236), 2)
    s.shape([(0, 116), (50, 92), (104, 110), (160, 86), (256, 112), (256, 160), (0, 160)], (122, 148, 118))
    s.band(150, (128, 130, 132), (94, 96, 99), 5)
    s.soft(128, 208, 236, 22, (30, 30, 34), 0.75)
    s.shape([(22, 176), (26, 150), (62, 138), (92, 106), (158, 104), (192, 136), (232, 146), (240, 176), (236, 196),
             (26, 196)], (190, 32, 38))
    s.shape([(22, 176), (240, 176), (236, 196), (26, 196)], (140, 20, 27))
    s.shape([(72, 138), (97, 112), (122, 111), (122, 138)], (58, 76, 92))
    s.shape([(128, 138), (128, 111), (154, 110), (180, 138)], (58, 76, 92))
    s.shape([(76, 138), (98, 115), (106, 114), (86, 138)], (120, 146, 164))
    s.line([(30, 152), (234, 150)], (226, 92, 92), 2)
    s.line([(125, 112), (126, 192)], (120, 16, 22), 1.2)
    s.box(134, 150, 146, 153, (60, 10, 14), 1)
    s.ellipse(222, 150, 239, 162, (250, 246, 222))
    s.box(20, 156, 28, 168, (250, 120, 80), 2)
    s.box(232, 180, 246, 192, (70, 72, 78), 3)
    s.box(14, 180, 28, 192, (70, 72, 78), 3)
    s.wheel(70, 194, 24)
    s.wheel(190, 194, 24)
    return s


def bird() -> Scene:
    s = Scene((176, 200, 150), (96, 130, 84), 3)
    for x, y, w in ((40, 60, 120), (210, 110, 150), (80, 200, 180)):
        s.soft(x, y, w, 90, (140, 172, 110), 0.6)
    s.line([(0, 214), (90, 200), (170, 204), (256, 186)], (92, 66, 46), 10)
    s.line([(0, 211), (90, 197), (170, 201), (256, 183)], (136, 102, 72), 3)
    s.shape([(70, 160), (14, 196), (22, 208), (96, 182)], (74, 62, 58))  # tail
    s.shape([(66, 150), (88, 110), (130, 92), (166, 84), (190, 104), (188, 142), (160, 178), (118, 190), (82, 180)],
            (146, 116, 92))
    s.ellipse(104, 96, 186, 192, (206, 112, 62))
    s.ellipse(104, 140, 164, 194, (226, 206, 182))
    s.shape([(62, 158), (96, 112), (140, 108), (148, 138), (112, 168), (40, 186)], (104, 82, 68))  # wing
    for y in (128, 142, 156):
        s.line([(138, y - 8), (100, y + 10), (60, y + 22)], (70, 54, 46), 3)
    s.ellipse(138, 52, 204, 116, (124, 98, 80))
    s.ellipse(160, 70, 204, 118, (212, 116, 62))
    s.shape([(198, 76), (228, 86), (199, 94)], (50, 44, 40))
    s.ellipse(176, 70, 190, 84, (18, 16, 16))
    s.ellipse(182, 72, 186, 76, (255, 255, 255))
    for x in (126, 148):
        s.line([(x, 186), (x + 3, 204)], (60, 48, 42), 4)
    return s


def ship() -> Scene:
    s = Scene((118, 164, 206), (222, 230, 232), 4)
    s.soft(60, 50, 130, 26, (255, 255, 255), 0.7)
    s.soft(200, 76, 140, 20, (255, 255, 255), 0.6)
    s.band(158, (58, 104, 136), (22, 58, 92), 14)
    s.shape([(14, 132), (28, 186), (214, 186), (246, 126), (214, 134)], (30, 48, 78))
    s.shape([(22, 170), (28, 186), (214, 186), (224, 168)], (150, 40, 40))
    s.shape([(14, 132), (16, 138), (212, 140), (246, 130), (246, 126), (214, 134)], (236, 238, 240))
    s.box(40, 104, 176, 134, (242, 244, 246))
    s.box(52, 80, 158, 106, (230, 234, 238))
    s.box(112, 58, 150, 82, (246, 247, 249))
    for y, x0, x1 in ((114, 46, 172), (90, 58, 154)):
        for x in range(x0, x1 - 6, 13):
            s.box(x, y, x + 7, y + 8, (52, 74, 98), 1)
    s.box(116, 64, 147, 70, (44, 62, 84))
    s.shape([(66, 80), (70, 42), (92, 42), (94, 80)], (196, 50, 44))
    s.shape([(69, 52), (70, 42), (92, 42), (92.5, 52)], (32, 34, 38))
    s.line([(130, 58), (130, 24)], (80, 88, 98), 2)
    s.line([(206, 134), (206, 96)], (80, 88, 98), 2)
    s.soft(52, 28, 90, 18, (120, 126, 134), 0.5)
    for x, w in ((30, 60), (90, 70), (150, 70), (214, 60)):
        s.soft(x, 188, w, 9, (232, 242, 246), 0.85)
    return s


def truck() -> Scene:
    s = Scene((164, 198, 224), (232, 236, 234), 5)
    s.shape([(0, 130), (70, 108), (150, 126), (256, 102), (256, 170), (0, 170)], (134, 150, 108))
    s.band(166, (120, 120, 120), (86, 87, 90), 5)
    s.soft(128, 214, 250, 20, (28, 28, 32), 0.75)
    s.box(12, 58, 164, 188, (238, 239, 236), 2)  # the load
    s.box(12, 58, 164, 68, (206, 208, 206), 2)
    s.box(12, 164, 164, 188, (40, 94, 148))
    for x in range(32, 164, 20):
        s.line([(x, 70), (x, 162)], (218, 220, 218), 1.4)
    s.box(10, 188, 232, 200, (50, 52, 56))
    cab = (44, 104, 164)
    s.shape([(170, 198), (170, 84), (214, 84), (232, 128), (244, 136), (246, 198)], cab)
    s.shape([(170, 198), (170, 170), (246, 170), (246, 198)], (30, 74, 122))
    s.shape([(192, 130), (192, 94), (210, 94), (224, 130)], (66, 86, 104))
    s.shape([(194, 130), (194, 96), (201, 96), (208, 130)], (130, 158, 178))
    s.line([(186, 92), (186, 192)], (24, 62, 104), 1.4)
    s.box(234, 150, 246, 162, (250, 244, 214), 2)
    s.box(226, 184, 250, 198, (64, 66, 72), 2)
    for x in (46, 90, 208):
        s.wheel(x, 198, 20)
    return s


def horse(silhouette: Path) -> Scene:
    """A silhouette (CC0, see README.md) as a chestnut horse on a meadow."""
    s = Scene((170, 204, 230), (228, 236, 226), 6)
    s.shape([(0, 120), (80, 96), (150, 116), (256, 92), (256, 180), (0, 180)], (108, 138, 96))
    s.band(150, (132, 160, 82), (78, 116, 52), 16)
    s.soft(128, 226, 190, 20, (40, 62, 30), 0.7)
    mask = Image.open(silhouette).convert("L").point(lambda v: 255 - v)
    mask = mask.crop(mask.getbbox())
    width = 210 * SCALE
    mask = mask.resize((width, mask.height * width // mask.width), Image.Resampling.LANCZOS)
    t = np.linspace(0, 1, mask.height)[:, None, None]
    rows = np.asarray((158, 94, 50)) * (1 - t) + np.asarray((78, 42, 24)) * t
    coat = Image.fromarray(np.broadcast_to(rows, (mask.height, mask.width, 3)).astype(np.uint8))
    s.image.paste(coat, (23 * SCALE, round(228 * SCALE) - mask.height), mask)
    return s


def main() -> None:
    folder = Path(__file__).parent
    for scene in (airplane, automobile, bird, ship, truck):
        scene().save(folder / f"{scene.__name__}.jpg")
    if (folder / "horse_silhouette.png").exists():
        horse(folder / "horse_silhouette.png").save(folder / "horse.jpg")


if __name__ == "__main__":
    main()
