"""`lightning doctor`: what is installed, what of it works, and who owns the command."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import wave
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

_PACKAGES = (
    "seqzoo",
    "torch",
    "lightning",
    "hydra-core",
    "omegaconf",
    "triton",
    "numpy",
    "pandas",
    "pyarrow",
)
_MORE = ("torchvision", "torchaudio", "safetensors", "rich")
_FIX = "pip install --force-reinstall --no-deps seqzoo"
# A decoder may hang or crash; it is tried in a process of its own, for so many seconds.
_TIME_OUT = 60


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def versions() -> list[dict[str, Any]]:
    """Python, the machine, and the packages that matter."""
    rows = [{"what": "python", "found": f"{platform.python_version()} ({sys.executable})"}]
    rows.append({"what": "system", "found": f"{platform.platform()}, {os.cpu_count()} CPUs"})
    return rows + [{"what": name, "found": _version(name)} for name in (*_PACKAGES, *_MORE)]


def accelerators() -> list[dict[str, Any]]:
    """GPUs that torch sees."""
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return [{"what": f"gpu {i}", "found": name} for i, name in enumerate(names)]
    if torch.backends.mps.is_available():
        return [{"what": "gpu", "found": "mps"}]
    built = torch.version.cuda or torch.version.hip
    return [
        {
            "what": "gpu",
            "found": f"none ({f'torch built for {built}' if built else 'torch built for the CPU'})",
        }
    ]


def kernel_rows() -> list[dict[str, Any]]:
    """Operation, backend, usable or why not."""
    try:
        from ..kernels.dispatch import backends

        found = backends()
    except Exception as error:
        return [{"what": "kernels", "backend": "-", "found": f"cannot be listed: {type(error).__name__}: {error}"}]
    return [
        {"what": op, "backend": name, "found": reason}
        for op, known in sorted(found.items())
        for name, reason in known.items()
    ]


# Decoders: a clip is written here byte by byte, so that no encoder is needed --------------------------------

_FRAMES, _WIDTH, _HEIGHT = 4, 32, 16


def write_video(path: Path) -> None:
    """Four grey frames, 32 x 16, brightness 40, 80, 120, 160, as uncompressed YUV4MPEG2."""
    chroma = bytes([128]) * (_WIDTH * _HEIGHT // 2)
    with path.open("wb") as file:
        file.write(f"YUV4MPEG2 W{_WIDTH} H{_HEIGHT} F5:1 Ip A1:1 C420jpeg\n".encode())
        for n in range(_FRAMES):
            file.write(b"FRAME\n" + bytes([40 * (n + 1)]) * (_WIDTH * _HEIGHT) + chroma)


def write_audio(path: Path) -> None:
    """A tenth of a second of a 500 Hz square wave, 16-bit mono at 8 kHz."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes((b"\x00\x20" * 8 + b"\x00\xe0" * 8) * 50)


def _decode_decord(path: str) -> str:
    import decord

    reader = decord.VideoReader(path, num_threads=1)
    return _frames([float(reader[i].asnumpy().mean()) for i in range(len(reader))])


def _decode_av(path: str) -> str:
    import av

    with av.open(path) as container:
        return _frames([float(f.to_ndarray(format="gray").mean()) for f in container.decode(video=0)])


def _decode_torchcodec(path: str) -> str:
    from torchcodec.decoders import VideoDecoder

    decoder: Any = VideoDecoder(path)
    return _frames([float(decoder[i].float().mean()) for i in range(len(decoder))])


def _frames(means: list[float]) -> str:
    """What was decoded, judged: the frames must be all there and grow brighter by the steps that were
    written.
    """
    steps = [b - a for a, b in pairwise(means)]
    if len(means) != _FRAMES or not all(30 < step < 60 for step in steps):
        return f"decodes wrongly: {len(means)} of {_FRAMES} frames, mean brightness {[round(m) for m in means]}"
    return "ok"


def _decode_soundfile(path: str) -> str:
    import soundfile

    samples, rate = soundfile.read(path)
    right = rate == 8000 and len(samples) == 800 and abs(samples[0] - 0.25) < 1e-3
    return "ok" if right else f"decodes wrongly: {len(samples)} samples at {rate} Hz"


_DECODERS: dict[str, tuple[str, Callable[[str], str]]] = {
    "decord": ("video", _decode_decord),
    "av": ("video", _decode_av),
    "torchcodec": ("video", _decode_torchcodec),
    "soundfile": ("audio", _decode_soundfile),
}


def decode(name: str, path: str) -> str:
    """Decode the clip at `path` with one package: "ok", or what came out wrong."""
    return _DECODERS[name][1](path)


def probe_decoder(name: str, path: Path) -> str:
    """`decode` in a process of its own: "ok", or the reason."""
    if importlib.util.find_spec(name) is None:
        return "not installed"
    code = f"from {__name__} import decode; print(decode({name!r}, {str(path)!r}))"
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=_TIME_OUT, check=False
        )
    except subprocess.TimeoutExpired:
        return f"hangs: no answer within {_TIME_OUT} s"
    if done.returncode < 0:
        return f"crashes: signal {-done.returncode}"
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    if done.returncode == 0:
        return lines[-1] if lines else "no answer"
    errors = [line for line in lines if re.match(r"^[\w.]*(Error|Exception)\b", line)]
    return f"fails: {(errors or lines or ['no message'])[-1][:160]}"


def decoder_rows() -> list[dict[str, Any]]:
    """Each decoder that seqzoo can use, tried on a clip."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        video, audio = Path(folder) / "clip.y4m", Path(folder) / "clip.wav"
        write_video(video)
        write_audio(audio)
        for name, (kind, _) in _DECODERS.items():
            found = probe_decoder(name, video if kind == "video" else audio)
            rows.append({"what": name, "kind": kind, "version": _version(name), "found": found})
    return rows


# Extras and the command -------------------------------------------------------------------------------------


def extra_rows() -> list[dict[str, Any]]:
    """Each extra: installed, or what is missing."""
    try:
        requirements = importlib.metadata.requires("seqzoo") or []
    except importlib.metadata.PackageNotFoundError:
        return [{"what": "seqzoo", "found": "not installed as a package"}]
    from packaging.requirements import Requirement

    extras: dict[str, list[str]] = {}
    for text in requirements:
        requirement = Requirement(text)
        match = re.search(r"extra\s*==\s*['\"](\w+)['\"]", text)
        if match is None or requirement.name == "seqzoo":
            continue
        missing = extras.setdefault(match[1], [])
        if requirement.marker is None or requirement.marker.evaluate({"extra": match[1]}):
            version = _version(requirement.name)
            if version == "not installed":
                missing.append(requirement.name)
            elif not requirement.specifier.contains(version, prereleases=True):
                missing.append(f"{requirement.name} {version} (needs {requirement.specifier})")
    return [
        {
            "what": f"seqzoo[{name}]",
            "found": "installed" if not missing else f"missing {', '.join(missing)}: pip install 'seqzoo[{name}]'",
        }
        for name, missing in sorted(extras.items())
    ]


def command_rows() -> list[dict[str, Any]]:
    """Which packages declare the commands, and which one the file on PATH belongs to."""
    rows = []
    for command in ("lightning", "seqzoo"):
        points = importlib.metadata.entry_points(group="console_scripts", name=command)
        owners = sorted({point.dist.name if point.dist else point.value for point in points})
        beside = Path(sys.executable).with_name(command)
        path = shutil.which(command) or (str(beside) if beside.is_file() else None)
        others = [owner for owner in owners if owner != "seqzoo"]
        if path is None:
            found = f"not on PATH; `{sys.executable} -m seqzoo` is the same command"
        else:
            module = _script_module(Path(path))
            ours = module.startswith("seqzoo")
            found = f"{path} runs {module or 'something unknown'}"
            if not ours:
                found += f": not ours; `seqzoo` or `python -m seqzoo` is, or: {_FIX}"
            elif others:
                found += f"; also claimed by {', '.join(others)}: if it is lost, {_FIX}"
        rows.append({"what": command, "declared by": ", ".join(owners) or "nobody", "found": found})
    return rows


def _script_module(path: Path) -> str:
    """The module that a console script imports its function from, '' where it cannot be read."""
    try:
        text = path.read_bytes().decode("utf-8", errors="ignore")
    except OSError:
        return ""
    match = re.search(r"^\s*from ([\w.]+) import", text, re.MULTILINE)
    return match[1] if match else ""


def problem_rows() -> list[dict[str, Any]]:
    """What does not fit together, and what to do."""
    try:
        from .failures.versions import problems

        return problems()
    except Exception as error:  # a broken installation must not hide the rest
        found = f"cannot be looked for: {type(error).__name__}: {error}"
        return [{"what": "problems", "problem": found, "do": _FIX}]


def report(*, as_json: bool = False) -> None:
    """Print everything."""
    sections = {
        "problems": problem_rows(),
        "versions": versions() + accelerators(),
        "kernels": kernel_rows(),
        "decoders": decoder_rows(),
        "extras": extra_rows(),
        "command": command_rows(),
    }
    if as_json:
        json.dump(sections, sys.stdout, indent=2)
        print()
        return
    from .results import print_table

    for title, rows in sections.items():
        if title == "problems" and not rows:
            rows = [{"what": "-", "problem": "none found", "do": "-"}]
        print_table(rows, title=title)
        print()
