"""What of an installation does not fit together, each with the command that mends it; `lightning doctor` prints it."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

TESTED_TORCH = ((2, 11), (2, 14))  # the oldest and the newest that the tests ran with
_LEAST_DISK, _LEAST_SHARED = 2 << 30, 128 << 20  # bytes: caches and checkpoints; batches of the loaders' processes
# Packages whose own requirements matter to a run: they are built against one version of another.
_BUILT_AGAINST = ("torch", "torchvision", "torchaudio", "torchcodec", "lightning", "pandas", "pyarrow")
Problem = dict[str, Any]


def _problem(what: str, problem: str, do: str) -> Problem:
    return {"what": what, "problem": problem, "do": do}


def requirement_problems(
    owner: str, requirements: Sequence[str], installed: Callable[[str], str | None], *, also_missing: bool = True
) -> list[Problem]:
    """What `owner` needs and does not have.

    requirements: its lines as its metadata have them; those of extras are left out. installed: the version of a
    package, None where it is not there. also_missing: tell those that are not there, not only the wrong ones.
    """
    from packaging.requirements import Requirement

    found = []
    for line in requirements:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = installed(requirement.name)
        wish = f"{requirement.name}{requirement.specifier}"
        if version is None:
            if also_missing:
                found.append(
                    _problem(requirement.name, f"not installed, but {owner} needs it", f"pip install '{wish}'")
                )
        elif not requirement.specifier.contains(version, prereleases=True):
            found.append(_problem(requirement.name, f"{version}, but {owner} needs {wish}", f"pip install '{wish}'"))
    return found


def python_problems(wanted: str | None, version: str) -> list[Problem]:
    """wanted: the range of Python, ">=3.11"."""
    from packaging.specifiers import SpecifierSet

    if wanted is None or SpecifierSet(wanted).contains(version, prereleases=True):
        return []
    return [_problem("python", f"{version}, but seqzoo needs {wanted}", "make an environment with a newer Python")]


def torch_problems(version: str, partners: Mapping[str, str]) -> list[Problem]:
    """A torch that nobody has tested, and partners of it that are built for another device.

    partners: versions of torchvision and torchaudio that are installed, "0.29.1+cpu".
    """
    found = []
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    low, high = TESTED_TORCH
    if numbers > high:
        found.append(
            _problem(
                "torch",
                f"{version} is newer than {high[0]}.{high[1]}, the newest that seqzoo is tested with",
                f"pip install 'torch>={low[0]}.{low[1]},<{high[0]}.{high[1] + 1}' where something fails",
            )
        )
    device = _device(version)
    for name, other in partners.items():
        if device and _device(other) and _device(other) != device:
            found.append(
                _problem(
                    name,
                    f"{other} is built for {_device(other)}, torch {version} for {device}: its operators do not load",
                    f"pip install --force-reinstall --no-deps {name} from the index that torch came from",
                )
            )
    return found


def _device(version: str) -> str:
    """The device, "cpu" or "cu130", of "2.14.1+cpu"; empty for a version that does not say."""
    local = version.partition("+")[2]
    return local if re.fullmatch(r"cpu|cu\d+|rocm[\d.]+|xpu", local) else ""


def cuda_problems(
    built: str | None,
    driver: int | None,
    *,
    works: bool,
    there: bool,
    capability: tuple[int, int] | None = None,
    compiled: Sequence[str] = (),
) -> list[Problem]:
    """The CUDA that torch is built for beside the driver.

    built: of torch, "13.0", None for the CPU. driver: the newest CUDA that the driver runs, 12040 for 12.4; None where
    there is none. works: torch sees a GPU. there: the machine has an NVIDIA driver. capability: of the first GPU.
    compiled: the architectures that torch has kernels for, "sm_90".
    """
    if built is None:
        if not there:
            return []
        return [_problem("torch", "built for the CPU, but this machine has an NVIDIA driver", "install torch for CUDA")]
    found = []
    if driver is not None and 0 < driver // 1000 < int(built.split(".")[0]):
        runs = f"{driver // 1000}.{driver % 1000 // 10}"
        do = f"update the NVIDIA driver, or install torch for CUDA {runs.split('.')[0]}.x"
        found.append(_problem("cuda", f"torch is built for CUDA {built}, the driver runs {runs} at most", do))
    elif there and not works:
        do = "look at `nvidia-smi` and CUDA_VISIBLE_DEVICES; in a container, start it with its GPUs"
        found.append(_problem("cuda", f"torch is built for CUDA {built} and sees no GPU, though a driver is there", do))
    if capability is not None and compiled:
        known = {int(name[3:].rstrip("a")) for name in compiled if re.fullmatch(r"sm_\d+a?", name)}
        number = 10 * capability[0] + capability[1]
        if known and not any(n // 10 == capability[0] and n <= number for n in known):
            do = "install a torch that is built for it"
            found.append(
                _problem(
                    "cuda", f"torch has no kernels for this GPU, sm_{number} (it has {min(known)} to {max(known)})", do
                )
            )
    return found


def import_problems(names: Sequence[str]) -> list[Problem]:
    """Packages that are installed and cannot be imported: built against another torch or numpy."""
    found = []
    for name in names:
        if importlib.util.find_spec(name) is None:
            continue
        try:
            importlib.import_module(name)
        except Exception as error:
            said = " ".join(str(error).split())[:120]
            do = f"pip install --force-reinstall --no-deps {name} of the release that fits this torch"
            found.append(_problem(name, f"cannot be imported: {type(error).__name__}: {said}", do))
    return found


def space_problems(free: Mapping[str, int], shared: int | None) -> list[Problem]:
    """free: bytes that are left by folder. shared: those of /dev/shm in all, None where there is none."""
    found = []
    for folder, number in free.items():
        if number < _LEAST_DISK:
            do = "free some space, or choose another disk with paths.runs=, data.cache_dir= or SEQZOO_CACHE"
            found.append(_problem(folder, f"{number / 1e9:.1f} GB are free", do))
    if shared is not None and shared < _LEAST_SHARED:
        do = "data.num_workers=0, or more of it: `docker run --shm-size=2g`"
        found.append(_problem("/dev/shm", f"{shared >> 20} MB in all: loader processes pass batches through it", do))
    return found


def problems() -> list[Problem]:
    """All of this installation, [] where everything fits."""
    import torch

    meta = importlib.metadata
    found = python_problems(_range("seqzoo"), platform.python_version())
    for owner in ("seqzoo", *_BUILT_AGAINST):
        version = _installed(owner)
        if version is not None or owner == "seqzoo":
            lines = (meta.requires(owner) or []) if version is not None else []
            found += requirement_problems(owner, lines, _installed, also_missing=owner == "seqzoo")
    partners = {name: v for name in ("torchvision", "torchaudio") if (v := _installed(name)) is not None}
    found += torch_problems(torch.__version__, partners) + import_problems(tuple(partners))
    works = torch.cuda.is_available()
    if torch.version.hip is None:
        driver = torch._C._cuda_getDriverVersion() if hasattr(torch._C, "_cuda_getDriverVersion") else None
        found += cuda_problems(
            torch.version.cuda,
            driver,
            works=works,
            there=Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None,
            capability=torch.cuda.get_device_capability() if works else None,
            compiled=torch.cuda.get_arch_list() if works else (),
        )
    from ..cache import cache_root

    folders = {str(f): f for f in (Path.cwd(), _there(cache_root()), Path(tempfile.gettempdir()))}
    shared = Path("/dev/shm")
    return found + space_problems(
        {name: shutil.disk_usage(folder).free for name, folder in folders.items()},
        shutil.disk_usage(shared).total if shared.is_dir() and os.name == "posix" else None,
    )


def _there(path: Path) -> Path:
    """The folder itself, or the nearest above it that is there."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _range(name: str) -> str | None:
    try:
        return importlib.metadata.metadata(name).json.get("requires_python")  # type: ignore[return-value]
    except importlib.metadata.PackageNotFoundError:
        return None
