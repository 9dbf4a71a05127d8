"""How closely an audit looks, and what it takes for amiss: all thresholds and sample sizes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from robustbench_local.errors import UserError

Level: TypeAlias = Literal["cheap", "full"]


@dataclass(frozen=True, kw_only=True)
class Audit:
    """The settings of `audit_victim` and `audit_attack`; conf/audit/ has them as a group.

    Always:

    - `images`: test images, the first ones, at which the victim is looked at. `passes`: forward
      passes of the same images; `spread`: an L2 distance of normalised logits that is a
      difference, up to 0.1 (the largest there is is 2).
    - `softmax_tolerance`: how far the sum of probabilities may be from 1.
    - `smallest_test`: test images below which a result is that of a subset.

    At level `full`, where the attack and others are run again:

    - `sample`: on so many test images, the first ones.
    - `stray_images`: so many images that come out differently are luck and raise nothing;
      `deviations`: and so many standard errors, where the victim draws random numbers. Where a
      check allows a share of the sample, the larger of the two governs: the stray image below
      `100 * stray_images / share` images, thus up to 200 for `points` and 500 for
      `black_box_points` with the defaults, and the share above. At the default `sample` of 100 the
      two shares have no effect.
    - `factor`: so many times the steps (or queries, or restarts) may change robust accuracy by
      `points`, in percent of the sample.
    - `last_steps` may bring at most the share `falling` of what the loss rises in all.
    - `epsilon_factors`: other radii, as multiples of epsilon. `unbounded`: radii at which every
      image should fall, as shares of the largest perturbation there is; one of them is enough.
    - `black_box_queries`: points that the Square attack tries, per image; it may break
      `black_box_points` more. Each is one forward pass, of a victim that draws random numbers twice
      as many as the attack averages draws.
    - `noise_draws`: random points of the budget, per image.
    - `frozen_images`: images attacked with the victim's randomness held still.
    """

    level: Level = "cheap"
    images: int = 256
    passes: int = 5
    spread: float = 1e-4
    softmax_tolerance: float = 1e-5
    smallest_test: int = 1000
    sample: int = 100
    stray_images: int = 1
    deviations: float = 2.0
    factor: int = 2
    points: float = 0.5
    last_steps: int = 10
    falling: float = 0.05
    epsilon_factors: Sequence[float] = (0.5, 2.0)
    unbounded: Sequence[float] = (1.0, 0.5)
    black_box_queries: int = 1000
    black_box_points: float = 0.2
    noise_draws: int = 1000
    frozen_images: int = 16

    def __post_init__(self) -> None:
        if self.level not in get_args(Level):
            raise UserError(
                f"audit.level={self.level}; expected cheap or full: type audit=cheap or audit=full"
            )
        _require_counts(self, 1, ("images", "smallest_test", "sample", "last_steps"))
        _require_counts(self, 1, ("black_box_queries", "noise_draws", "frozen_images"))
        _require_counts(self, 2, ("passes", "factor"))
        _require_counts(self, 0, ("stray_images",))
        for name in (
            "spread", "softmax_tolerance", "deviations", "points", "falling", "black_box_points"
        ):  # fmt: skip
            value = getattr(self, name)
            if not _is_number(value) or value < 0:
                raise UserError(
                    f"audit.{name}={value}; expected a number from 0: leave it out for the default"
                )
        if self.spread > 0.1:
            raise UserError(
                f"audit.spread={self.spread}; expected a distance of unit vectors up to 0.1, since "
                "a larger one would call every victim deterministic: leave it out for the default"
            )
        for name in ("epsilon_factors", "unbounded"):
            values = getattr(self, name)
            listed = isinstance(values, Sequence) and not isinstance(values, str)
            if not listed or not values or not all(_is_number(v) and v > 0 for v in values):
                raise UserError(
                    f"audit.{name}={values}; expected a list of numbers above 0: type for example "
                    f"audit.{name}=[0.5,1]"
                )
            object.__setattr__(self, name, tuple(map(float, values)))
        if max(self.unbounded) > 1:
            raise UserError(
                f"audit.unbounded={list(self.unbounded)}; expected shares of the largest "
                "perturbation, up to 1: type audit.unbounded=[1,0.5]"
            )


def _require_counts(audit: Audit, least: int, names: Sequence[str]) -> None:
    for name in names:
        value = getattr(audit, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(
                f"audit.{name}={value}; expected a whole number from {least}: type audit.{name}="
                f"{max(least, 10)}"
            )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value
