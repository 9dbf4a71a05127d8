"""One-pixel and few-pixel attacks: differential evolution, many images at once."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from robustbench_local.attacks.base import Attack, require_count
from robustbench_local.attacks.pixels import Memory, Scorer, paint, representatives
from robustbench_local.attacks.target import Target, check_target
from robustbench_local.errors import UserError
from robustbench_local.oracle import is_settled
from robustbench_local.randomness import Draws, derive_seed
from robustbench_local.threat import ThreatModel
from robustbench_local.types import Access, Images, Labels, Model, Norm


@dataclass(frozen=True, kw_only=True)
class OnePixel(Attack):
    """Differential evolution over k pixels (Su, Vargas and Sakurai 2019, arXiv:1710.08864).

    k is `threat.epsilon`, under l0. A candidate is k times (row, column, colour). Each generation
    every candidate of the `population` has one child, a + `mutation` * (b - c) of three different
    ones drawn from the generation before, no crossover; it replaces its parent where it is
    better. There are `generations` of them, so an image costs population * (generations + 1)
    forward passes at most, times `eot_samples`; choosing a `target` may take one more.

    Several pixels are more numbers than 100 generations settle: `attack=few_pixel` spends the same
    queries on a quarter of the population and four times the generations.

    - `candidates`: images in one forward pass at most, of all examples together, or `None` for a
      number that suits the device. It bounds memory (beside it about 60 kB for each example) and
      changes no result.
    - `eot_samples`: forward passes averaged for each candidate, of a victim not known to give the
      same answer twice.
    - `random_generations`: the generations for such a victim, each of whose answers costs its own
      average over draws, or `None` for as many as for any other; the record says where it counted.
    - `target`: the class to reach, see `attacks.target`.

    An image leaves as soon as one of its candidates reaches the goal; images that resist to the
    end come back with their best candidate. Randomised victims (see
    `is_settled`) are attacked to the end instead, and the last generation goes into
    looking at the whole population afresh: the best of many noisy looks is a lucky one.

    Deviations from the paper. It stops an image at a confidence (5% for the true class, 90% for a
    target), here a wrong prediction is enough. Fitness is the log-odds of the class, not its
    probability: the same order, but it does not saturate. Colours are rounded to the 256 levels of
    its images when they are painted, and the answers about recent candidates are remembered where
    their pixels fit into 40 bits: the search is the same and its later generations cost next to
    nothing. Where the paper is silent, children are kept inside: positions by reflection, colours
    by clamping.
    """

    needs: ClassVar[Access] = "scores"
    norms: ClassVar[frozenset[Norm]] = frozenset({"l0"})

    population: int = 400
    generations: int = 100
    mutation: float = 0.5
    eot_samples: int = 1
    random_generations: int | None = None
    candidates: int | None = None
    target: Target = None

    def __post_init__(self) -> None:
        check_target(self.target)
        for name in ("population", "generations", "eot_samples"):
            require_count(name, getattr(self, name))
        for name in ("random_generations", "candidates"):
            if getattr(self, name) is not None:
                require_count(name, getattr(self, name))
        if self.population < 3:
            raise UserError(
                f"attack.population={self.population}; a child has three different parents, so "
                "expected 3 or more"
            )
        if not 0 < self.mutation <= 2:  # also NaN
            raise UserError(
                f"attack.mutation={self.mutation}; expected a weight above 0, up to 2, type for "
                "example attack.mutation=0.5"
            )

    def report(self, threat: ThreatModel) -> Mapping[str, Any]:
        """`reduced`, where a random victim was searched for fewer generations than others are."""
        return dict(self.notes)

    def run(self, model: Model, x: Images, y: Labels, threat: ThreatModel) -> Images:
        """All examples generation by generation; those whose goal is reached leave."""
        pixels = int(threat.epsilon)
        y, targeted = self.goal(model, x, y)
        settled = is_settled(model, self.eot_samples)
        scorer = Scorer(
            model, x, y,
            targeted=targeted, at_once=self.candidates,
            samples=1 if settled else self.eot_samples,
        )  # fmt: skip
        generations = self.generations
        if not settled and self.random_generations is not None:
            generations = self.random_generations
        if generations < self.generations:
            self.notes["reduced"] = (
                f"{generations} generations instead of {self.generations}, since the victim is "
                "random"
            )
        rounds, left = generations + int(settled), threat.query_budget
        if left is not None:
            left -= int(targeted)  # choosing the class may have taken a look
            if not settled:  # whole generations, the last one for the fresh look
                rounds = min(rounds, left // (self.population * self.eot_samples) - 1)
                rounds = max(1, rounds)
        swarm = _Swarm(scorer, pixels, self.population, left, recalls=settled, seed=self.seed)
        best = scorer.x.clone()
        for generation in range(rounds):
            children = swarm.evolve(self.mutation) if generation else swarm.scatter()
            score, reached = swarm.measure(children)
            swarm.select(children, score)
            if settled:
                done = reached.any(1)
                if done.any():
                    rows, images = swarm.champions(done, children, score.where(reached, -torch.inf))
                    best[rows] = images
                    swarm.keep(~done)
            if swarm.finished():
                break
        if not settled:
            swarm.look_again()
        everyone = torch.ones_like(swarm.rows, dtype=torch.bool)
        rows, images = swarm.champions(everyone, swarm.genes, swarm.fitness)
        best[rows] = images
        return best


class _Swarm:
    """The populations of the examples still searched, `rows` (n,) of the batch.

    `genes` (n, population, k, 2 + C): row and column in pixels, then the colour in [0, 1], all
    continuous; `fitness` (n, population), -inf where there was no query left to ask.
    """

    def __init__(
        self,
        scorer: Scorer,
        pixels: int,
        population: int,
        left: int | None,
        *,
        recalls: bool,
        seed: int,
    ) -> None:
        x = scorer.x
        _, channels, height, width = x.shape
        self._scorer = scorer
        self._draws = Draws(x, derive_seed(seed, "one pixel"))
        self._size = torch.tensor([height, width], dtype=torch.float32, device=x.device)
        self._places = height * width
        self.rows = torch.arange(len(x), device=x.device)
        self.genes = torch.zeros(
            (len(x), population, pixels, 2 + channels), dtype=torch.float32, device=x.device
        )
        self.fitness = x.new_full((len(x), population), -torch.inf)
        self._left = None if left is None else torch.full_like(self.rows, left)
        fits = recalls and Memory.fits(pixels, self._places, channels)
        self._memory = Memory(x) if fits else None

    def scatter(self) -> Tensor:
        """The first generation: positions anywhere, colours normal around grey, as in the paper."""
        n, population, pixels, genes = self.genes.shape
        where = self._draws.uniform(population * pixels * 2).view(n, population, pixels, 2)
        colours = self._draws.normal(population * pixels * (genes - 2))
        colours = colours.mul_(127 / 255).add_(128 / 255).clamp_(0, 1)
        return torch.cat((where * self._size, colours.view(n, population, pixels, -1)), 3)

    def evolve(self, mutation: float) -> Tensor:
        """One child for every member: a + mutation * (b - c), brought back inside."""
        n, population = self.fitness.shape
        draw = self._draws.uniform(3 * population).view(n, 3, population)
        choices = torch.tensor([population, population - 1, population - 2], device=draw.device)
        a, b, c = (draw * choices[:, None]).long().minimum(choices[:, None] - 1).unbind(1)
        # The second is counted from the first on, the third passes over both: all different.
        b = (a + 1 + b) % population
        low, high = torch.minimum(a, b), torch.maximum(a, b)
        c = c + (c >= low).long()
        c = c + (c >= high).long()
        flat = self.genes.flatten(2)
        one, two, three = (
            flat.gather(1, chosen[:, :, None].expand(-1, -1, flat.shape[2])) for chosen in (a, b, c)
        )
        children = (one + mutation * (two - three)).view_as(self.genes)
        where = children[..., :2]
        where.copy_(self._size - (where.remainder(2 * self._size) - self._size).abs())
        children[..., 2:].clamp_(0, 1)
        return children

    def _read(self, genes: Tensor) -> tuple[Tensor, Tensor]:
        """The pixels that genes stand for: places (..., k) and 8-bit levels (..., k, C)."""
        size = self._size.long()
        where = genes[..., :2].long().minimum(size - 1)
        return where[..., 0] * size[1] + where[..., 1], (genes[..., 2:] * 255).round_().long()

    def measure(self, genes: Tensor) -> tuple[Tensor, Tensor]:
        """How good the candidates are and whether they reach the goal, (n, population) each."""
        shape = self.fitness.shape
        places, levels = self._read(genes)
        fresh = torch.ones(shape, dtype=torch.bool, device=genes.device).view(-1)
        score = self.fitness.new_full((len(fresh),), -torch.inf)
        if self._memory is not None:
            rows = self.rows[:, None].expand(shape)
            keys = Memory.keys(rows, places, levels, self._places).view(-1)
            same = representatives(keys)
            known, answers = self._memory.recall(keys)
            score = score.where(~known, answers)
            fresh = ~known & (same == torch.arange(len(same), device=same.device))
        if self._left is not None:
            fresh = self._afford(fresh.view(shape)).view(-1)
        asked = fresh.nonzero().squeeze(1)
        reached = torch.zeros_like(fresh)
        if len(asked):
            colours = levels.flatten(0, 1)[asked].to(self.fitness.dtype).div_(255)
            owners = self.rows[asked // shape[1]]
            score[asked], reached[asked] = self._scorer(
                owners, places.flatten(0, 1)[asked], colours
            )
        if self._memory is not None:
            self._memory.store(keys[asked], score[asked])
            score = score[same]
        return score.view(shape), reached.view(shape)

    def _afford(self, fresh: Tensor) -> Tensor:
        """Those of the candidates, in order, that each example has queries left for."""
        assert self._left is not None
        samples = self._scorer.samples
        within = fresh & (fresh.cumsum(1) * samples <= self._left[:, None])
        self._left -= within.sum(1) * samples
        return within

    def select(self, children: Tensor, score: Tensor) -> None:
        """Children replace their own parents where they are better."""
        better = score > self.fitness
        self.genes = torch.where(better[:, :, None, None], children, self.genes)
        self.fitness = torch.where(better, score, self.fitness)

    def look_again(self) -> None:
        """Forget how good the candidates once seemed, where there are queries for a fresh look."""
        score, _ = self.measure(self.genes)
        looked = (score > -torch.inf).any(1, keepdim=True)
        self.fitness = torch.where(looked, score, self.fitness)

    def champions(self, which: Tensor, genes: Tensor, score: Tensor) -> tuple[Tensor, Images]:
        """The best candidate of some examples (a mask), as rows and images.

        Examples about which nothing could be asked are left out.
        """
        value, place = score.max(1)
        chosen = (which & (value > -torch.inf)).nonzero().squeeze(1)
        places, levels = self._read(genes[chosen, place[chosen]])
        colours = levels.to(score.dtype).div_(255)
        return self.rows[chosen], paint(self._scorer.x, self.rows[chosen], places, colours)

    def keep(self, going: Tensor) -> None:
        """Search on for some examples (a mask)."""
        self.rows, self._draws = self.rows[going], self._draws[going]
        self.genes, self.fitness = self.genes[going], self.fitness[going]
        if self._left is not None:
            self._left = self._left[going]

    def finished(self) -> bool:
        """Whether nobody is left, or nobody has a query left."""
        if self._left is None:
            return len(self.rows) == 0
        return not bool((self._left >= self._scorer.samples).any())
