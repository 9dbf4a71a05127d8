"""On what, and with what, a number was measured."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version

import torch

from robustbench_local import __version__
from robustbench_local.identity import PACKAGE

_LIBRARIES = ("torchattacks", "adversarial-robustness-toolbox", "pyautoattack")
_PACKAGES = ("torch", "torchvision", *_LIBRARIES, "numpy")


def library_versions() -> dict[str, str | None]:
    """The versions of the libraries whose attacks can be used."""
    return {name: _version(name) for name in _LIBRARIES}


def environment(device: torch.device) -> dict[str, object]:
    """Device, threads, versions, and the commit of this package where it runs from a checkout."""
    return {
        "device": device.type,
        "device_name": _device_name(device),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "robustbench_local": __version__,
        "packages": {name: _version(name) for name in _PACKAGES},
        **_commit(),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {torch.backends.cpu.get_cpu_capability()}"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> dict[str, object]:
    """Empty for an installed package, also one that lies inside somebody else's repository."""
    if _git("ls-files", "--error-unmatch", "__init__.py") is None:
        return {"git_commit": None, "git_dirty": None}
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {"git_commit": _git("rev-parse", "HEAD"), "git_dirty": bool(changes)}


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(PACKAGE), *words], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
