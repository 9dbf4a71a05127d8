"""Where other libraries run: seeded, silent, and without effect on anybody else."""

import contextlib
import io
import logging
import random
import warnings
from collections.abc import Iterator

import numpy as np
import torch

from robustbench_local.gradients import seed_global


class _Seeded(np.random.RandomState):
    """A generator that takes its seed from the global one where none is given, not from chance."""

    def __init__(self, seed: int | None = None) -> None:
        super().__init__(int(np.random.randint(2**31)) if seed is None else seed)


@contextlib.contextmanager
def importing_art() -> Iterator[None]:
    """Quiet: ART logs where its data would lie, and imports modules that announce their end."""
    log = logging.getLogger("art")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


@contextlib.contextmanager
def sandbox(seed: int, device: torch.device) -> Iterator[None]:
    """Global generators seeded, nothing printed, no warnings; the caller restores the states.

    A GPU is the current one: ART moves models to whichever that is.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    seed_global(seed)
    fresh, log = np.random.RandomState, logging.getLogger("art")
    level = log.level
    current = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        torch.enable_grad(),
        current,
    ):
        warnings.simplefilter("ignore")
        np.random.RandomState = _Seeded  # type: ignore[assignment,misc]
        log.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            log.setLevel(level)
            np.random.RandomState = fresh  # type: ignore[misc]
