"""GPUs and CPU threads, dealt out among the processes of a sweep on one machine."""

import os
from collections.abc import Mapping
from itertools import count

from filelock import FileLock, Timeout

from robustbench_local.sweeps.journal import Info, Journal

_HELD: list[FileLock] = []
"""What this process has claimed, until it ends: the system then frees it, however that came."""


def cores() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def visible_gpus(environment: Mapping[str, str], found: int) -> list[str]:
    """What CUDA_VISIBLE_DEVICES can be set to, for each of the `found` GPUs that torch sees.

    A setting that is there already says which ones, by number or by name.
    """
    given = environment.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        return [str(number) for number in range(found)]
    return [name.strip() for name in given.split(",") if name.strip()][:found]


def settle(journal: Journal, info: Info, device: str) -> None:
    """Take a GPU and a share of the cores for this process, before CUDA starts in it.

    Several processes share a GPU where there are more of them. One that the configuration names,
    such as `cuda:1`, is left alone.
    """
    if os.getpid() == info.pid:  # no worker: all is its own
        return
    if info.gpus and device in ("auto", "cuda") and not _HELD:
        os.environ["CUDA_VISIBLE_DEVICES"] = claim(journal, info)
    if info.threads is not None:
        import torch

        torch.set_num_threads(info.threads)


def claim(journal: Journal, info: Info) -> str:
    """The GPU that the fewest other processes of the sweep have claimed."""
    journal.folder.mkdir(parents=True, exist_ok=True)
    for place in count():
        for gpu in info.gpus:
            lock = FileLock(journal.folder / f"gpu-{gpu}-{place}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            _HELD.append(lock)
            return gpu
    raise AssertionError("unreachable")
