"""The command line of results: fold, look, compare, merge, take along, run again."""

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from robustbench_local.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from robustbench_local.results.store import Store

# What takes long to import, torch among it, is imported in the functions: --help must not wait.

FILTERS = (
    "dataset", "model", "train", "defense", "norm", "epsilon", "access", "awareness", "attack",
)  # fmt: skip


class _Parser(argparse.ArgumentParser):
    """Its errors are ours: one sentence."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; type {self.prog} --help for what there is")


def parser() -> argparse.ArgumentParser:
    """Every command and option."""
    common = _Parser(add_help=False)
    common.add_argument(
        "--results", metavar="DIR", type=Path, default=argparse.SUPPRESS,
        help="the results folder (default: results)",
    )  # fmt: skip
    filters = _Parser(add_help=False)
    for key in FILTERS:
        filters.add_argument(f"--{key}", metavar="NAME", help=argparse.SUPPRESS)
    named = " ".join(f"--{key}" for key in FILTERS)
    top = _Parser(
        prog="python -m robustbench_local.results",
        description="Without a command: fold the records into the leaderboard again.",
        parents=[common],
    )
    commands = top.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)

    def add(name: str, told: str, *more: _Parser, epilog: str = "") -> argparse.ArgumentParser:
        parents = [common, *more]
        return commands.add_parser(
            name, help=told, description=told, epilog=epilog, parents=parents
        )

    only = f"Lines can be chosen by {named}, each with a name."
    show = add("show", "the leaderboard, or one run in full", filters, epilog=only)
    show.add_argument("run_id", nargs="?", metavar="RUN_ID", help="or the beginning of one")
    compare = add(
        "compare", "two victims or more on the same images",
        epilog="A victim is a run id or its beginning, or key=value,key=value, which selects all "
               "its records: several attacks count by their worst case, several seeds all.",
    )  # fmt: skip
    compare.add_argument("victims", nargs="+", metavar="VICTIM")
    compare.add_argument(
        "--anyway", action="store_true", help="although awareness, or attacks met, differ"
    )
    merge = add("merge", "copy the records of another results folder into this one")
    merge.add_argument("other", type=Path, metavar="OTHER_DIR")
    export = add("export", "the leaderboard as CSV, Markdown, LaTeX or JSON", filters, epilog=only)
    export.add_argument("--format", required=True, choices=("csv", "md", "latex", "json"))
    export.add_argument("--output", type=Path, metavar="FILE", help="in place of the terminal")
    again = add("reproduce", "run a record again and compare every number")
    again.add_argument("run_id", metavar="RUN_ID", help="or its beginning, or the file of a record")
    again.add_argument("--data", type=Path, default=Path("data"), metavar="DIR")
    again.add_argument("--cache", type=Path, default=Path("cache"), metavar="DIR")
    again.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help="such as dataset.path=FILE where the file lies elsewhere",
    )  # fmt: skip
    return top


def main(words: Sequence[str]) -> int:
    """Do what the command line says; 1 after an error or a difference, 130 after Ctrl-C."""
    try:
        chosen = parser().parse_args(words)
        chosen.results = getattr(chosen, "results", Path("results")).expanduser()
        return _COMMANDS[chosen.command](chosen)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        name = error.filename or "a file"
        told = f"{name} cannot be used ({error.strerror or error})"
        print(f"error: {told}; type --results DIR or another file", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted: nothing is torn; type the same command again", file=sys.stderr)
        return 130
    return 1


def _store(chosen: argparse.Namespace) -> "Store":
    from robustbench_local.results.store import Store

    store = Store(chosen.results)
    if not store.records.is_dir():
        raise UserError(
            f"{chosen.results} holds no records; expected a results folder, with records/ in it: "
            "type --results DIR"
        )
    return store


@contextmanager
def _telling(console: "Console") -> Iterator[list[str]]:
    """Records that do not count are told in a sentence each; yields those sentences."""
    from rich.markup import escape

    told: list[str] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield told
    finally:
        told += dict.fromkeys(str(warning.message) for warning in caught)
        for sentence in told:
            note = f"[yellow]note[/yellow] {escape(sentence)}"
            console.print(note, soft_wrap=True, highlight=False)


def _errors() -> "Console":
    from rich.console import Console

    return Console(stderr=True)


def _rebuild(chosen: argparse.Namespace) -> int:
    from robustbench_local.display import output
    from robustbench_local.results.leaderboard import write_leaderboard

    store = _store(chosen)
    files = {path.stem for path in store.records.glob("*.json")}
    with _telling(_errors()) as told:
        path = write_leaderboard(store)
    missed = {stem for stem in files if any(f"{stem}.json" in sentence for sentence in told)}
    with path.open(encoding="utf-8") as file:
        lines = sum(1 for _ in file) - 1
    aside = len(list(store.records.glob("*.json.damaged")))
    found = len(files) - len(missed)
    console = output()
    console.print(
        f"{found} record{'s' * (found != 1)} counted; {len(missed)} not counted"
        + (", named above" if missed else "")
        + f"; {aside} set aside as .damaged",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    console.print(f"{lines} lines: {path}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _filters(chosen: argparse.Namespace) -> dict[str, str]:
    return {key: value for key in FILTERS if (value := getattr(chosen, key)) is not None}


def _show(chosen: argparse.Namespace) -> int:
    from robustbench_local.display import output
    from robustbench_local.results.finding import one_record
    from robustbench_local.results.leaderboard import fold
    from robustbench_local.results.one import show_record
    from robustbench_local.results.tables import filtered, show_leaderboard

    store, wanted = _store(chosen), _filters(chosen)
    with _telling(_errors()):
        if chosen.run_id is not None:
            if wanted:
                raise UserError(
                    f"a run id and --{min(wanted)} came together; expected one of the two: type "
                    f"show {chosen.run_id}"
                )
            show_record(one_record(store, chosen.run_id), output())
        else:
            show_leaderboard(filtered(fold(store), wanted, str(store.folder)), output())
    return 0


def _compare(chosen: argparse.Namespace) -> int:
    from robustbench_local.display import output
    from robustbench_local.results.compare import compare

    if len(chosen.victims) < 2:
        raise UserError(
            f"compare came with {chosen.victims[0]} alone; expected two victims or more: type "
            f"compare {chosen.victims[0]} OTHER"
        )
    with _telling(_errors()):
        compare(_store(chosen), chosen.victims, output(), anyway=chosen.anyway)
    return 0


def _merge(chosen: argparse.Namespace) -> int:
    from robustbench_local.display import output
    from robustbench_local.results.store import Store

    store, console = Store(chosen.results), output()
    with _telling(_errors()):
        report = store.merge(chosen.other.expanduser())
    told = (
        f"{len(report.added)} added, {len(report.duplicates)} there already, "
        f"{len(report.conflicts)} in conflict, {len(report.damaged)} damaged"
    )
    console.print(told, highlight=False)
    for run_id, sentence in report.conflicts:
        told = f"conflict: run {run_id}: {sentence}; the record that was here stays"
        console.print(told, markup=False, highlight=False, soft_wrap=True)
    for damaged in report.damaged:
        console.print(f"damaged: {damaged}", markup=False, highlight=False, soft_wrap=True)
    if store.records.is_dir():
        _rebuild(chosen)
    return 1 if report.conflicts else 0


def _export(chosen: argparse.Namespace) -> int:
    from robustbench_local.files import atomic_path
    from robustbench_local.results.leaderboard import fold
    from robustbench_local.results.tables import exported, filtered

    store = _store(chosen)
    with _telling(_errors()):
        table = filtered(fold(store), _filters(chosen), str(store.folder))
    text = exported(table, chosen.format)
    if chosen.output is None:
        sys.stdout.write(text)
        return 0
    path = chosen.output.expanduser()
    with atomic_path(path) as temporary:
        temporary.write_text(text, "utf-8")
    print(f"{len(table)} lines: {path}", file=sys.stderr)
    return 0


def _reproduce(chosen: argparse.Namespace) -> int:
    from robustbench_local.results.reproduce import reproduce

    with _telling(_errors()):
        return reproduce(
            chosen.results, chosen.run_id, data=chosen.data, cache=chosen.cache, changes=chosen.set
        )


_COMMANDS: dict[str | None, Callable[[argparse.Namespace], int]] = {
    None: _rebuild,
    "show": _show,
    "compare": _compare,
    "merge": _merge,
    "export": _export,
    "reproduce": _reproduce,
}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
