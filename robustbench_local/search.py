"""A search for the settings with which training ends best, by held-out training images."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import SoftFileLease

from robustbench_local.display import output
from robustbench_local.errors import UserError
from robustbench_local.identity import content_id
from robustbench_local.leases import Watch, holder, lease_at, take
from robustbench_local.processes import agree, leads
from robustbench_local.randomness import derive_seed

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

    from hydra_plugins.robustbench_local.search import OptunaSearch

ROBUST, PLAIN = "robust_validation_accuracy", "validation_accuracy"

Outcome = tuple[str, float] | str
"""What a trial was measured by and its value in [0, 1]; or why it failed."""

Launch = Callable[[list[list[str]], int], Sequence[Outcome]]
"""Runs trials, each given as words of a command line; the first one has that number."""


@dataclass(frozen=True, kw_only=True)
class Space:
    """What is searched: words that stay, and for each key of the others what it may be."""

    fixed: list[str]
    free: "Mapping[str, BaseDistribution]"

    def grid(self) -> list[dict[str, Any]] | None:
        """All settings; None where they are infinitely many."""
        values: list[Sequence[Any]] = []
        for one in self.free.values():
            if hasattr(one, "choices"):
                values.append(one.choices)
            elif isinstance(one.low, int):  # type: ignore[attr-defined]
                values.append(range(one.low, one.high + 1, one.step))  # type: ignore[attr-defined]
            else:
                return None
        return [dict(zip(self.free, chosen, strict=True)) for chosen in itertools.product(*values)]

    def words(self, settings: Mapping[str, Any]) -> list[str]:
        """The command line of a trial."""
        return [*self.fixed, *(f"{key}={value}" for key, value in settings.items())]


def read_space(overrides: "Sequence[Override]") -> Space:
    """The space that words of a command line describe.

    Raises `UserError` for an empty one, and for one of settings that trials are measured with.
    """
    from hydra.core.override_parser.types import IntervalSweep, RangeSweep
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    fixed: dict[str, str] = {}
    free: dict[str, Any] = {}
    for override in overrides:
        key, value = override.get_key_element(), override.value()
        fixed.pop(key, None)  # the last one counts
        free.pop(key, None)
        if not override.is_sweep_override():
            fixed[key] = f"{key}={override.get_value_element_as_str()}"
            continue
        if isinstance(value, IntervalSweep):
            low, high, log = value.start, value.end, "log" in value.tags
            if low is None or high is None or not low < high or (log and low <= 0):
                raise UserError(
                    f"{key} is searched from {low} to {high}; expected a smaller and a larger "
                    f"number, above 0 with the tag log: type {key}='interval(0.1, 1)'"
                )
            if isinstance(low, int) and isinstance(high, int):
                free[key] = IntDistribution(low, high, log=log)
            else:
                free[key] = FloatDistribution(low, high, log=log)
            continue
        if isinstance(value, RangeSweep) and all(
            isinstance(number, int) for number in (value.start, value.stop, value.step)
        ):
            numbers = range(*(int(n) for n in (value.start, value.stop, value.step)))  # type: ignore[arg-type]
            if len(numbers) > 1 and numbers.step > 0:
                free[key] = IntDistribution(numbers[0], numbers[-1], step=numbers.step)
                continue
        choices = list(override.sweep_string_iterator())
        if not choices:
            raise UserError(f"{key} has no values to choose from; type {key}='choice(A, B)'")
        free[key] = CategoricalDistribution(choices)
    if not free:
        raise UserError(
            "nothing to search for; expected settings with several values: type for example "
            "train.learning_rate='tag(log, interval(1e-4, 1e-1))'"
        )
    for key, values in free.items():
        if key.startswith("train.threat.") or ".validation." in key:
            first = values.choices[0] if hasattr(values, "choices") else values.low
            raise UserError(
                f"{key} is what trials are measured with, so the weakest would win; expected one "
                f"value for all: type {key}={first}"
            )
    return Space(fixed=list(fixed.values()), free=free)


@dataclass(kw_only=True)
class Search:
    """A study in the folder `storage`, None for one in memory, and what of it is still to do."""

    space: Space
    n_trials: int
    n_jobs: int
    seed: int
    startup: int
    storage: Path | None
    tried: "dict[int, Trial]" = field(default_factory=dict, init=False)
    lease: SoftFileLease | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        for name, least in (("n_trials", 1), ("n_jobs", 1), ("seed", 0), ("startup", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UserError(
                    f"hydra.sweeper.{name}={value}; expected a whole number from {least}: type "
                    f"hydra.sweeper.{name}={max(least, 8)}"
                )
        grid = self.space.grid()
        self.grid = grid if grid is not None and len(grid) <= self.n_trials else None
        self.study = self._open()
        self.goal = self.n_trials if self.grid is None else len(self.grid)

    def _open(self) -> "Study":
        """The study of the same space and seed, with what a killed search left open closed."""
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
        from optuna.trial import TrialState

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        space = {key: repr(value) for key, value in self.space.free.items()}
        name = content_id({"fixed": self.space.fixed, "free": space, "seed": self.seed})
        if self.storage is None:
            return optuna.create_study(direction="maximize")
        self.storage.mkdir(parents=True, exist_ok=True)
        self.lease = lease_at(self.storage / f"{name}.lease")
        take(self.lease, self._refuse(Watch(self.lease)))
        backend = JournalFileBackend(str(self.storage / f"{name}.log"))
        study = optuna.create_study(
            storage=JournalStorage(backend),
            study_name=name,
            direction="maximize",
            load_if_exists=True,
        )
        for trial in study.get_trials(states=(TrialState.RUNNING,)):
            study.tell(trial.number, state=TrialState.FAIL)
            if self.grid is None:
                study.enqueue_trial(trial.params)
        return study

    def _refuse(self, watch: Watch) -> Callable[[], None]:
        """Raises where the holder lives; one of another machine may take a while to show it."""
        told = set[bool]()

        def wait() -> None:
            if watch.lives():
                assert self.lease is not None
                raise UserError(
                    f"{holder(self.lease)} is at the same search; expected one at a time: wait for "
                    f"it, or type hydra.sweeper.seed={self.seed + 1} for another one"
                )
            if not told:
                output().print("the same search has a holder; looking whether it lives")
            told.add(True)

        return wait

    @property
    def finished(self) -> "list[FrozenTrial]":
        """Trials that have a value or failed, without those that were interrupted."""
        from optuna.trial import TrialState

        done = self.study.get_trials(states=(TrialState.COMPLETE, TrialState.FAIL))
        return [t for t in done if t.state == TrialState.COMPLETE or "failed" in t.user_attrs]

    @property
    def best(self) -> "FrozenTrial | None":
        """The first of those with the highest value."""
        valued = [trial for trial in self.finished if trial.value is not None]
        return max(valued, key=lambda trial: (trial.value, -trial.number), default=None)

    def next_batch(self) -> list[tuple[int, list[str]]]:
        """The next trials, with their numbers; empty when the search is over.

        A space with no more settings than trials is gone through. Else a draw depends on the seed,
        its number and what was found before, so that a search that went on ends like any other.
        """
        from optuna.samplers import TPESampler

        batch = []
        for _ in range(max(0, min(self.n_jobs, self.goal - len(self.finished)))):
            number = len(self.study.trials)
            self.study.sampler = TPESampler(
                seed=derive_seed(self.seed, "search", number) % 2**32,
                n_startup_trials=self.startup,
                constant_liar=True,
            )
            if self.grid is not None:
                asked = [trial.params for trial in self._open_or_finished()]
                left = [settings for settings in self.grid if settings not in asked]
                if not left:
                    break
                self.study.enqueue_trial(left[0])
            trial = self.study.ask(dict(self.space.free))
            self.tried[trial.number] = trial
            batch.append((trial.number, self.space.words(trial.params)))
        return batch

    def close(self) -> None:
        """Let another process go on."""
        if self.lease is not None:
            self.lease.release()

    def _open_or_finished(self) -> "list[FrozenTrial]":
        from optuna.trial import TrialState

        return [*self.finished, *self.study.get_trials(states=(TrialState.RUNNING,))]

    def tell(self, number: int, outcome: Outcome) -> None:
        """Keep what came of a trial; what is measured otherwise than the others has failed."""
        from optuna.trial import TrialState

        measured = self.study.user_attrs.get("measure")
        if not isinstance(outcome, str) and measured not in (None, outcome[0]):
            outcome = f"it has {outcome[0]}, the others have {measured}: they cannot be compared"
        if isinstance(outcome, str):
            self.tried[number].set_user_attr("failed", outcome)
            self.study.tell(number, state=TrialState.FAIL)
            return
        self.study.set_user_attr("measure", outcome[0])
        self.study.tell(number, outcome[1])

    def run(self, launch: Launch) -> None:
        """Launch what is left; where several processes train together one of them decides."""
        while batch := agree(self.next_batch):
            outcomes = launch([words for _, words in batch], batch[0][0])
            if leads():
                for (number, _), outcome in zip(batch, outcomes, strict=True):
                    self.tell(number, outcome)
                    say_outcome(self, number)


def say_outcome(search: Search, number: int) -> None:
    """A line for a trial, with what it is worth and what the best one so far is worth."""
    from robustbench_local.display import output

    trial, best = search.study.trials[number], search.best
    told = f"trial {number + 1} of {search.goal}: "
    if trial.value is None or best is None:
        told += f"failed ({trial.user_attrs.get('failed', 'interrupted')})"
    else:
        measure = str(search.study.user_attrs["measure"]).replace("_", " ")
        told += f"{measure} {trial.value:.2%}, the best so far {best.value:.2%}"
    output().print(told, soft_wrap=True, highlight=False, markup=False)


def score(records: object) -> Outcome:
    """What a trial is worth: the accuracy of its weights on validation images, robust if measured.

    The records say more, of the test set, that is not looked at here.
    """
    if not isinstance(records, list) or not records:
        return "its run failed"
    validation = records[0]["weights"]["validation"]
    for measure in (ROBUST, PLAIN):
        if measure in validation and math.isfinite(validation[measure]):
            return measure, float(validation[measure])
    return "nothing was trained, so there is no validation accuracy"


def from_hydra(sweeper: "OptunaSearch", arguments: Sequence[str]) -> None:
    """Search as a sweeper of Hydra. Raises `UserError` without Optuna, and where no trial ends."""
    import importlib.util

    from hydra.core.override_parser.overrides_parser import OverridesParser

    if importlib.util.find_spec("optuna") is None:
        raise UserError(
            "a search needs Optuna, which is not installed: type "
            "pip install 'robustbench-local[search]'"
        )
    assert sweeper.hydra_context is not None and sweeper.config is not None  # set up before
    words = [f"{key}={value}" for key, value in sweeper.params.items()]
    parser = OverridesParser.create(sweeper.hydra_context.config_loader)
    space = read_space(parser.parse_overrides([*words, *arguments]))
    search = Search(
        space=space,
        n_trials=sweeper.n_trials,
        n_jobs=sweeper.n_jobs,
        seed=sweeper.seed,
        startup=sweeper.startup,
        storage=Path(str(sweeper.storage)).expanduser() if leads() else None,  # others follow
    )

    def launch(trials: list[list[str]], first: int) -> list[Outcome]:
        assert sweeper.launcher is not None
        results = sweeper.launcher.launch(trials, initial_job_idx=first)
        return [_outcome(result) for result in results]

    began_with = len(search.finished)
    try:
        search.run(launch)
        if leads():
            # Typed without it, an experiment that chose this sweeper would search once more.
            typed = sweeper.config.hydra.overrides.hydra
            own = any(word.startswith("hydra/sweeper=") for word in typed)
            tell(search, began_with, experiments=own)
    finally:
        search.close()


def _outcome(result: Any) -> Outcome:
    try:
        return score(result.return_value)
    except Exception as error:  # which return_value raises where the job did
        return " ".join(str(error).split())[:300] or type(error).__name__


def tell(search: Search, began_with: int, *, experiments: bool) -> None:
    """Print what was found, and the words to type, with or without the `experiments` among them."""
    from rich.markup import escape

    from robustbench_local.display import output

    console = output()

    def say(sentence: str, style: str | None = None) -> None:
        console.print(escape(sentence), style=style, soft_wrap=True, highlight=False)

    finished, best = search.finished, search.best
    failed = [trial for trial in finished if trial.value is None]
    for trial in failed:
        words = " ".join(f"{key}={value}" for key, value in trial.params.items())
        say(f"failed: {words}: {trial.user_attrs['failed']}")
    if best is None:
        raise UserError(
            f"all {len(finished)} trials of the search failed; expected one at least to end: type "
            "the settings of one of them for a run of its own"
        )
    measure = search.study.user_attrs["measure"]
    every = "" if search.grid is None else ", which are all settings there are"
    before = f", {began_with} of them before" if began_with else ""
    lost = f", {len(failed)} failed" if failed else ""
    say(f"\nsearch: {len(finished)} trials{every}{before}{lost}", "bold")
    if measure == PLAIN:
        say("note: by plain validation accuracy, since these defenses measure no robust one")
    own = search.space.fixed
    if not experiments:
        own = [word for word in own if not word.lstrip("+").startswith("experiment=")]
    chosen = [f"{key}={value}" for key, value in best.params.items()]
    say(f"best {measure.replace('_', ' ')}: {best.value:.2%} in trial {best.number + 1}; type")
    say("  " + " ".join([*own, *chosen]))
