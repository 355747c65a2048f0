"""Known sets of recordings: spoken digits in a folder, and the telephone prompts that Debian packages."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError, nearest
from .clips import Clip, assign_splits
from .sources import audio_files, named_clips

PROMPTS = Path("/usr/share/asterisk/sounds/en_US_f_Allison")
PROMPTS_PACKAGE = "asterisk-core-sounds-en-wav"
DIGITS = "https://github.com/Jakobovski/free-spoken-digit-dataset"
_TEST_TAKES = 5
_KINDS = ("digits", "letters", "phonetic")


def digit_clips(
    path: str | Path,
    protocol: str = "official",
    *,
    val_part: float = 0.1,
    test_speakers: Sequence[str] | None = None,
    seed: int = 0,
) -> list[Clip]:
    """The Free Spoken Digit Dataset: files `{digit}_{speaker}_{take}.wav` in a folder, or in its `recordings`.

    protocol: "official", takes 0 to 4 are the test and speakers are in all parts; "speakers", test and validation
    have speakers of their own. val_part: of the takes, or speakers, that are not for the test; seeded, at least one
    unless it is 0. test_speakers: of the second protocol, None: a seeded one of six.
    Raises UserError for another protocol or speaker, and for a folder of other names.
    """
    if protocol not in ("official", "speakers"):
        raise UserError(f"protocol={protocol!r} is not a choice.{nearest(protocol, ('official', 'speakers'))}")
    if not 0 <= val_part < 1:
        raise UserError(f"val_part={val_part} must be from 0 to below 1")
    root = Path(path).expanduser()
    if not root.is_dir():
        raise UserError(
            f"no spoken digits in {root}; get them with git clone {DIGITS}, then give that folder as data.path, or as "
            "fsdd in the folder of SEQZOO_DATA"
        )
    if (root / "recordings").is_dir():
        root = root / "recordings"
    clips = named_clips(root, "{label}_{speaker}_{take}")
    if protocol == "official":
        takes = [_take(clip) for clip in clips]
        rest = sorted({take for take in takes if take >= _TEST_TAKES})
        if not rest:
            raise UserError(f"{root} has no take above {_TEST_TAKES - 1}: takes 0 to {_TEST_TAKES - 1} are the test")
        number = min(len(rest) - 1, max(1, round(val_part * len(rest)))) if val_part else 0
        val = set(random.Random(seed).sample(rest, number))
        stages = ["test" if take < _TEST_TAKES else "val" if take in val else "train" for take in takes]
        return [clip._replace(split=stage) for clip, stage in zip(clips, stages, strict=True)]
    speakers = sorted({str(clip.group) for clip in clips})
    for name in test_speakers or ():
        if name not in speakers:
            raise UserError(f"{root} has no speaker {name!r}.{nearest(name, speakers)}")
    if test_speakers is None:
        test_speakers = random.Random(seed).sample(speakers, max(1, len(speakers) // 6))
    tested = [clip._replace(split="test") for clip in clips if clip.group in test_speakers]
    training = [clip for clip in clips if clip.group not in test_speakers]
    if val_part:
        training = assign_splits(training, (1 - val_part, val_part, 0.0), seed=seed)
    else:
        training = [clip._replace(split="train") for clip in training]
    return training + tested


def prompt_clips(path: str | Path | None = None, folder: str | None = None) -> list[Clip]:
    """Telephone prompts of one voice, 8 kHz, from Debian's asterisk-core-sounds-en-wav; the name of the file below the
    folder is its label: "vm-goodbye", "digits/7".

    folder: "digits", "letters" or "phonetic" alone. Raises UserError saying how to install them.
    """
    root = PROMPTS if path is None else Path(path).expanduser()
    if not root.is_dir():
        raise UserError(
            f"no prompts in {root}; Debian and Ubuntu have them: apt-get install {PROMPTS_PACKAGE}. Or name a folder "
            "of recordings whose file names are labels"
        )
    files = audio_files(root)
    if folder is not None:
        folders = sorted({file.parent.relative_to(root).as_posix() for file in files} - {"."})
        if folder not in folders:
            raise UserError(f"{root} has no folder {folder!r}.{nearest(folder, folders)}")
        files = [file for file in files if file.parent == root / folder]
    if not files:
        raise UserError(f"{root} has no audio files; Debian and Ubuntu have them: apt-get install {PROMPTS_PACKAGE}")
    return [Clip(file, 0.0, None, file.relative_to(root).with_suffix("").as_posix()) for file in files]


def prompts_by_kind(path: str | Path | None = None) -> list[Clip]:
    """The prompts with what they say as labels: "digits", "letters", "phonetic" (alpha, bravo ...) or "phrases", all
    others; the recordings of silence are left out. Raises UserError as `prompt_clips` does."""
    found = []
    for clip in prompt_clips(path):
        kind = clip.label.split("/")[0] if "/" in clip.label else ""
        if kind != "silence":
            found.append(clip._replace(label=kind if kind in _KINDS else "phrases"))
    return found


def prompt_text(label: str) -> str:
    """What a prompt is about, in words, from its label: "digits/mon-3" is "digits mon 3"."""
    return " ".join(re.split(r"[-_/]+", label)).strip()


def _take(clip: Clip) -> int:
    text = Path(clip.name).stem.rsplit("_", 1)[-1]
    if not text.isdigit():
        raise UserError(f"{clip.name}: the take {text!r} is not a number; names are digit_speaker_take")
    return int(text)
