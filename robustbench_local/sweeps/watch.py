"""One line for each run of a sweep as it ends, wherever it runs."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape

from robustbench_local.results import Record
from robustbench_local.results.report import common_notes, particular_notes, radius_in_words
from robustbench_local.sweeps.estimate import Estimate
from robustbench_local.sweeps.journal import Entry, Journal
from robustbench_local.sweeps.plan import Job, Plan

_EVERY = 0.3
"""Seconds between two looks."""


@dataclass(frozen=True)
class Ended:
    """How a job ended: with records, or with the sentence of an error."""

    job: Job
    error: str


class Watch:
    """Reads the journal, prints, and keeps what became of each job."""

    def __init__(
        self, journal: Journal, plan: Plan, estimate: Estimate, console: Console, said: set[str]
    ) -> None:
        self.journal = journal
        self.plan = plan
        self.estimate = estimate
        self.console = console
        self.said = said
        self.ended: dict[Job, Ended] = {}
        self.records: dict[str, Record] = dict(plan.records)
        self.silent = len(plan.jobs) == 1
        self._count = plan.recorded
        self._launched: dict[int, Job] = {}
        self._began = time.monotonic()
        self._lock = threading.Lock()

    def expect(self, first: int, jobs: Sequence[Job]) -> None:
        """These are launched now, under numbers from `first`."""
        self._launched.update(enumerate(jobs, first))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look by itself meanwhile, in a thread."""
        stop = threading.Event()

        def watch() -> None:
            while not stop.wait(_EVERY):
                self.look()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def look(self) -> None:
        """Tell what has ended since the last time."""
        with self._lock:
            for number in sorted(set(self.journal.numbers()) & self._launched.keys()):
                entry = self.journal.read(number)
                if entry is not None and entry.state != "running":
                    self._close(self._launched.pop(number), entry)

    @property
    def failures(self) -> list[Ended]:
        """The jobs that failed."""
        return [ended for ended in self.ended.values() if ended.error]

    def started(self, job: Job) -> Entry | None:
        """What a job that has not ended has said."""
        numbers = [number for number, each in self._launched.items() if each is job]
        return self.journal.read(numbers[-1]) if numbers else None

    def recover(self, job: Job) -> bool:
        """Whether a job that has not said how it ended has left its records; then it is done.

        It records first. Where recorded runs were to run again nobody can tell.
        """
        with self._lock:
            records = [job.store.find(name) for name in job.run_ids]
            if self.plan.forced or not records or None in records:
                return False
            self._tell(job, [record for record in records if record], None)
            self.ended[job] = Ended(job, "")
            return True

    def give_up(self, job: Job, error: str) -> None:
        """It will not be tried again."""
        with self._lock:
            self._fail(job, error)

    def _close(self, job: Job, entry: Entry) -> None:
        if entry.state == "failed":
            self._fail(job, entry.error)
            return
        records = [job.store.find(name) for name in entry.run_ids]
        if None in records:
            self._fail(job, "it ended, and its record is not there or damaged")
            return
        self._tell(job, [record for record in records if record], entry.seconds)
        if job.shard and not records:
            self._count += max(1, len(job.run_ids))
            self._print(job.name, f"recorded, the run is not whole yet, {entry.seconds:.0f} s")
        self.ended[job] = Ended(job, "")

    def _fail(self, job: Job, error: str) -> None:
        self.ended[job] = Ended(job, error)
        lost = [name for name in job.run_ids if name not in self.records]
        self._count += max(1, len(lost))
        self._print(job.name, f"failed: {error}", "red")

    def _tell(self, job: Job, records: Sequence[Record], seconds: float | None) -> None:
        new = [record for record in records if record["run_id"] not in self.records]
        for record in new:
            self.records[record["run_id"]] = record
            self._count += 1
            name = job.name
            if len(records) > 1:
                name += f", epsilon {radius_in_words(record['config']['threat']['epsilon'])}"
            spent = seconds if seconds is not None and len(records) == 1 else _attack(record)
            self._print(name, f"{_figures(record)}, {spent:.0f} s{self._left(job)}")
        if self.silent:
            return
        for note in dict.fromkeys(note for record in new for note in common_notes(record)):
            if note not in self.said:
                self.said.add(note)
                self.console.print(f"[yellow]note[/yellow] {escape(note)}", soft_wrap=True)
        for record in new:  # of each kind the first: the table has a star for every run
            for about, told in particular_notes(record).items():
                if about not in self.said:
                    self.said.add(about)
                    note = escape(f"{job.name}: {told}")
                    self.console.print(f"[yellow]note[/yellow] {note}", soft_wrap=True)

    def _print(self, name: str, told: str, style: str = "") -> None:
        if not self.silent:
            place = f"{self._count:>{len(str(self.plan.total))}} of {self.plan.total}"
            line = f"{place}  {name}: {told}"
            self.console.print(escape(line), soft_wrap=True, highlight=False, style=style)

    def _left(self, job: Job) -> str:
        """How much longer, at the speed so far: however many processes there are."""
        weights = self.estimate.seconds
        done = sum(weights[each] for each in {*self.ended, job} if each in weights)
        left = sum(weights.values()) - done
        if done <= 0 or left <= 0:
            return ""
        return f"; about {duration((time.monotonic() - self._began) * left / done)} left"


def _figures(record: Record) -> str:
    robust = record["robust_accuracy"]
    star = "*" if _doubted(record) else ""
    low, high = 100 * robust["low"], 100 * robust["high"]
    return (
        f"clean {100 * record['clean_accuracy']['value']:.1f}, robust {100 * robust['value']:.1f}"
        f"{star} ({low:.1f} - {high:.1f}), n {record['n']}"
    )


def _doubted(record: Record) -> bool:
    """Whether a flag is severe, other than what an oblivious attack brings with it."""
    known = record["labels"]["awareness"]
    return any(flag["severe"] and flag["name"] != known for flag in record["flags"])


def _attack(record: Record) -> float:
    return float(record["seconds"]["attack"] + record["seconds"]["judge"])


def duration(seconds: float) -> str:
    """In words, with no more digits than an estimate has."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min"
