"""What a result depends on besides the code: device, caches, versions, commit, date."""

from __future__ import annotations

import ctypes
import importlib.metadata
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from . import peers

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def last_level_cache(device: torch.device) -> int:
    """Bytes of the largest cache before memory; 32 MiB where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [_bytes(path.read_text()) for path in _CACHES.glob("index*/size")]
    return max(sizes, default=32 << 20)


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)([KMG]?)", text.strip())
    if match is None:
        raise ValueError(f"cache size is {text!r}, accepts a number with K, M or G")
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]]


def keep_freed_memory() -> bool:
    """Makes malloc hand freed memory out again rather than return it to the system; False where it cannot be asked.

    Fresh memory is zeroed by the system a page at a time, at every call and for every provider, which costs more than
    writing it. A training loop's allocator is warm; so is this one, then.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return False
    trim_threshold, mmap_max = -1, -4  # <malloc.h>
    return bool(mallopt(mmap_max, 0)) and bool(mallopt(trim_threshold, 2**31 - 1))


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    found = {key: re.search(rf"^{key}\s*: (.+)$", text, re.MULTILINE) for key in ("model name", "cpu family", "model")}
    name = found["model name"]
    if name is None:
        return platform.processor() or platform.machine()
    family, model = found["cpu family"], found["model"]
    # A virtual machine often names the maker alone; family and model then say which processor it is.
    return name[1] if not family or not model else f"{name[1]} (family {family[1]} model {model[1]})"


def commit() -> str:
    """The commit the package's source is at, with '+' when tracked files differ from it; 'unknown' outside git."""
    folder = Path(__file__).resolve().parent
    try:
        _git(folder, "ls-files", "--error-unmatch", Path(__file__).name)  # not the repository a wheel happens to lie in
        head = _git(folder, "rev-parse", "--short=12", "HEAD")
        sources = [":/csrc", ":/kernels", ":/pykernels"]
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", *sources)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed else "")


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def versions() -> str:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "pykernels"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "source" if name == "pykernels" else "absent"
    found |= {name: text.split(" ")[0] for name, text in peers.versions().items()}
    return " ".join(f"{name}={version}" for name, version in found.items())


def stamp(device: torch.device, threads: int) -> dict[str, Any]:
    """The columns that every row of a run shares."""
    return {
        "threads": threads if device.type == "cpu" else None,
        "device": device_name(device),
        "versions": versions(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def slug(device: torch.device) -> str:
    """The device as a file name: cpu-amd-epyc-family-25-model-17, nvidia-h200."""
    name = re.sub(r"\((R|TM)\)", "", device_name(device))
    text = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return f"cpu-{text}" if device.type == "cpu" else text
