"""The name of a set of weights: a hash of everything that decides them."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

from robustbench_local.identity import class_version, code_version, content_id
from robustbench_local.training.schedule import Schedule

if TYPE_CHECKING:
    from robustbench_local.data import Dataset
    from robustbench_local.defenses.recipe import Recipe

_CODE = (
    "data/dataset.py", "gradients.py", "models/build.py", "models/normalize.py", "randomness.py",
    "training/augmentation.py", "training/averaging.py", "training/course.py", "training/fit.py",
    "training/loop.py", "training/schedule.py", "training/step.py", "training/validation.py",
)  # fmt: skip
_ADVERSARIAL_CODE = (
    "attacks/base.py", "attacks/gradient.py", "attacks/target.py", "oracle.py", "rejection.py",
    "spatial.py", "threat.py",
)  # fmt: skip
"""What PGD and all other attacks rest on; the code of an attack itself comes with its settings."""


def weights_key(
    data: "Dataset",
    recipe: "Recipe",
    schedule: Schedule,
    *,
    seed: int,
    key: Mapping[str, object],
) -> str:
    """The key under which `fit` keeps its result, without training anything.

    `key` is what the caller adds, the model: `{"model": model_key(cfg.model)}`. Recipe and schedule
    describe themselves; `cfg.train` must not be added, since it holds the training budget, on which
    undefended weights do not depend.
    """
    return content_id(key_parts(data, recipe, schedule, seed=seed, key=key))


def key_parts(
    data: "Dataset",
    recipe: "Recipe",
    schedule: Schedule,
    *,
    seed: int,
    key: Mapping[str, object],
) -> dict[str, object]:
    """What `weights_key` hashes, readable. The code of a recipe is that of its own classes."""
    code = _CODE + (_ADVERSARIAL_CODE if recipe.adversarial else ())
    return {
        **key,
        "dataset": data.fingerprint,
        "input_shape": list(data.input_shape),
        "classes": data.num_classes,
        "recipe": describe(recipe),
        "schedule": describe(schedule),
        "seed": seed,
        "code": code_version(*code),
    }


def describe(value: Any) -> Any:
    """Any setting as JSON values; a dataclass with its name and the code that defines it."""
    if is_dataclass(value) and not isinstance(value, type):
        cls = type(value)
        settings = [field.name for field in fields(value) if field.compare]
        content = {name: describe(getattr(value, name)) for name in settings}
        # What a class inherits decides as much as what its own file says.
        code = [class_version(base) for base in cls.__mro__ if is_dataclass(base)]
        return {"": f"{cls.__module__}.{cls.__qualname__}", "code": code, **content}
    if isinstance(value, Mapping):
        return {str(name): describe(item) for name, item in value.items()}
    if isinstance(value, str | int | float | bool | None):
        return value
    if isinstance(value, Sequence):
        return [describe(item) for item in value]
    raise TypeError(
        f"{type(value).__name__} cannot be part of a recipe; expected plain values, dataclasses, "
        "lists and mappings"
    )
