"""One evaluation in several parts: which images of the test set belong to which."""

import re
from dataclasses import dataclass
from typing import Self

from robustbench_local.errors import UserError


@dataclass(frozen=True)
class Shard:
    """Part `number` of the `of` parts that an evaluation is split into; numbers begin at 1.

    A shard is a run of whole batches of the evaluation in one piece, since the draws of a random
    victim belong to the batch: together the shards are what that evaluation does.
    """

    number: int
    of: int

    @classmethod
    def parse(cls, value: object) -> Self | None:
        """The shard of a setting such as "2/4"; None for null. Raises `UserError`."""
        if value is None:
            return None
        form = re.fullmatch(r"(\d+)/(\d+)", str(value))
        number, of = map(int, form.groups()) if form else (0, 0)
        if not 1 <= number <= of:
            raise UserError(
                f"shard={value} is no part of an evaluation; expected the number of the part, from "
                "1, and of how many: type for example shard=1/4, or -m shard=1/4,2/4,3/4,4/4 for "
                "all parts"
            )
        return cls(number, of)

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    @property
    def first(self) -> bool:
        """Whether this is the shard that does what an evaluation does once, for all of them."""
        return self.number == 1

    def rows(self, images: int, *, at_once: int, images_of: int = 1) -> range:
        """The rows of a test set that is attacked `at_once` images after the other.

        `images_of` is how often each image is in a batch, once for each radius that is attacked
        together. Raises `UserError` where there are fewer batches than shards.
        """
        batches = -(-images // at_once)
        if self.of > batches:
            smaller = images // self.of
            typed = f"batch_size={max(1, smaller) * images_of}"
            typed += "" if smaller else f" shard=1/{images}"
            raise UserError(
                f"shard={self} needs {self.of} batches at least and {images} test images make "
                f"{batches}: type for example {typed}, with the same batch_size for every shard"
            )
        begin, end = (
            min(images, batches * part // self.of * at_once)
            for part in (self.number - 1, self.number)
        )
        return range(begin, end)
