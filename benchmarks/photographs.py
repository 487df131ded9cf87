"""Photographs that installed packages bring along, as crops for calibration and for comparison.

scikit-learn and scikit-image have a few sample images; some of Debian's packages 71 more:

    apt-get install --no-install-recommends lomiri-wallpapers-16.04 lomiri-wallpapers-20.04 \\
        mate-backgrounds plasma-workspace-wallpapers lxqt-themes palapeli-data opencv-doc

Drawings and patterns among them are left out, by name. Or give a folder of your own.

Legend for shapes: N crops, S pixels along each side.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Place: TypeAlias = tuple[Path, str, str]  # folder, pattern, names

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
PACKAGES = {
    "sklearn": ("datasets/images/{}.jpg", "china flower"),
    "skimage": (
        "data/{}.png",
        "astronaut brick camera chelsea coffee coins grass gravel motorcycle_left",
    ),
}
SHARED = {  # below a folder of shared data, such as /usr/share
    "backgrounds/{}.jpg": (
        "Bridge_by_Sander_Klootwijk Dragonfly_by_Bolly Kleiber_by_Lukas_Baubkus "
        "Picture_0B_by_freespace Picture_1A_by_freespace Wine_by_Jakkub_Mede "
        "aitzgorri_by_Aitzol_Berasategi free_by_Peter_Nerlich friends_by_Aitzol_Berasategi "
        "greentock_by_Peter_Nerlich life_by_Aitzol_Berasategi picosdeeuropa_by_Aitzol_Berasategi "
        "seeding_by_Clements_Engelhardt sunset_by_Aitzol_Berasategi"
    ),
    "backgrounds/mate/nature/{}.jpg": (
        "Aqua Blinds Dune FreshFlower Garden GreenMeadow LadyBird RainDrops Storm TwoWings Wood "
        "YellowFlower"
    ),
    "wallpapers/{}/contents/images/1920x1200.jpg": (
        "Autumn BytheWater ColdRipple ColorfulCups DarkestHour EveningGlow FallenLeaf Grey Kite "
        "OneStandsOut Path summer_1am"
    ),
}
MORE = {  # they came later: so that the first ones stay in the halves in which they were
    "doc/opencv-doc/examples/data/{}.jpg": (
        "aero1 aloeL apple baboon board building butterfly ela_original fruits home leuvenA messi5 "
        "orange squirrel_cls stuff"
    ),
    "doc/opencv-doc/examples/{}.png": "data/chicky_512 data/graf1 data/rubberwhale1",
    "doc/opencv-doc/examples/{}.jpg": "alphamat/input_images/plant hfs/data/000",
    "lxqt/wallpapers/{}.jpg": "Butterfly-Kenneth-Wimer after-the-rain fog this-is-not-windows",
    "lxqt/wallpapers/{}.png": "Valendas appleflower beam butterfly cloud drop flowers",
    "palapeli/collection/{}.jpg": (
        "castle-maintenon cincinnati-bridge citrus-fruits european-honey-bee "
        "panther-chameleon-female"
    ),
}


def photographs(folder: str | None = None) -> list[Path]:
    """Files of all photographs that are installed, or of all images below ``folder``, in order.

    Raises FileNotFoundError where there are fewer than ten.
    """
    if folder is None:
        places = [*_packages(), *_shared(SHARED)]
        found = sorted(_files(places), key=lambda p: p.parent.parent.parent.name + p.name)
        found += sorted(_files(_shared(MORE)), key=lambda p: p.name)
    else:
        found = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in SUFFIXES)
    if len(found) < 10:
        raise FileNotFoundError(
            f"found {len(found)} photographs in {folder or 'the installed packages'}; install "
            "scikit-image and the Debian packages that benchmarks/photographs.py names at its "
            "top, or give a folder that holds at least ten"
        )
    return found


def _files(places: Iterable[Place]) -> Iterator[Path]:
    for place, pattern, names in places:
        yield from (p for n in names.split() if (p := place / pattern.format(n)).is_file())


def _packages() -> Iterator[Place]:
    for package, (pattern, names) in PACKAGES.items():
        spec = find_spec(package)
        if spec is not None and spec.origin is not None:
            yield Path(spec.origin).parent, pattern, names


def _shared(patterns: Mapping[str, str]) -> Iterator[Place]:
    shares = os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
    for share in shares.split(":"):
        yield from ((Path(share), pattern, names) for pattern, names in patterns.items())


def halves(files: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """(photographs for calibration, photographs for comparison): every other one."""
    return list(files[::2]), list(files[1::2])


def crops(files: Sequence[Path], count: int, size: int = 224, seed: int = 0) -> Tensor:
    """``count`` random square crops in [0, 1], as many of each photograph: [N, 3, S, S].

    The side is 35% to 100% of the shorter side of the photograph; half of them are mirrored.
    Crops of one photograph do not follow each other, so any part of them is a mixture.
    """
    rng = np.random.default_rng(seed)
    out = torch.empty(count, 3, size, size)
    for i, file in enumerate(files):
        with Image.open(file) as opened:
            opened.draft("RGB", (4 * size, 4 * size))  # a JPEG is decoded at a smaller scale
            image = opened.convert("RGB")
        for n in range(i, count, len(files)):
            side = int(min(image.size) * rng.uniform(0.35, 1.0))
            left, top = (int(rng.integers(0, s - side + 1)) for s in image.size)
            box = (left, top, left + side, top + side)
            pixels = image.resize((size, size), Image.Resampling.BICUBIC, box)
            x = torch.from_numpy(np.array(pixels)).permute(2, 0, 1).float() / 255
            out[n] = x.flip(2) if rng.random() < 0.5 else x
    return out
