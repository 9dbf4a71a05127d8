"""What a record says of a network that a part of a defense has trained for itself."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robustbench_local.training import Trained

_MEANT = ("validation_at_chance", "cache_damaged")
"""The warnings of a training that mean the same here; others judge a robust classifier."""


def learned_by(trained: "Trained") -> dict[str, Any]:
    """Key, sha256, validation, seconds, warnings: JSON values."""
    return {
        "key": trained.key,
        "sha256": trained.sha256,
        "validation": trained.validation,
        "seconds": trained.seconds,
        "warnings": [each for each in trained.warnings if each.startswith(_MEANT)],
    }
