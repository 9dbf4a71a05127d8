"""`eot_samples: null` in a configuration: as many draws as the victim asks for."""

from collections.abc import Mapping
from typing import Any


def leaves_samples_open(settings: object) -> bool:
    """Whether the settings of an attack, or of a part of it, have `eot_samples: null`."""
    if not isinstance(settings, Mapping):
        return False
    here = "eot_samples" in settings and settings["eot_samples"] is None
    return here or any(leaves_samples_open(child) for child in settings.values())


def with_samples(settings: Any, samples: int) -> Any:
    """The same settings, with `samples` wherever `eot_samples` was null."""
    if not isinstance(settings, Mapping):
        return settings
    return {
        key: samples if key == "eot_samples" and child is None else with_samples(child, samples)
        for key, child in settings.items()
    }
