"""Robust accuracy against epsilon, drawn from records."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from robustbench_local.files import atomic_path
from robustbench_local.identity import content_id
from robustbench_local.results.leaderboard import strongest, victim_of
from robustbench_local.results.statistics import Interval
from robustbench_local.results.store import Record, Store
from robustbench_local.results.summary import Summary, summarise

_ALONE = ("dataset", "model", "train", "defense", "norm", "access", "awareness")


def draw_curve(store: Store, records: Sequence[Record]) -> Path:
    """A PNG below `curves/` with every recorded point of the records' victim and threat norm.

    One line for each attack, its 95% interval as a band, and the clean accuracy at 0. The
    points are those measured on the same weights and the same test images; of several runs of one
    point counts what counts in the leaderboard.
    """
    # Drawing needs no screen; imported here since most runs draw nothing.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    first = records[0]
    kin = [record for record in store.all() if _kinship(record) == _kinship(first)]
    lines: dict[str, dict[float, list[Summary]]] = defaultdict(lambda: defaultdict(list))
    for record in sorted(kin, key=lambda record: str(record["finished"])):
        lines[record["labels"]["attack"]][record["labels"]["epsilon"]].append(summarise(record))

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for attack in sorted(lines):
        points = lines[attack]
        radii = [0.0, *sorted(radius for radius in points if radius > 0)]
        accuracies = [Interval(**first["clean_accuracy"])]
        accuracies += [strongest(points[radius]).robust for radius in radii[1:]]
        values, low, high = zip(*accuracies, strict=True)
        (line,) = axes.plot(radii, values, marker="o", label=attack)
        axes.fill_between(radii, low, high, alpha=0.2, color=line.get_color())
    labels = first["labels"]
    axes.set_xlabel(f"epsilon ({labels['norm']}, pixel units)")
    axes.set_ylabel(f"robust accuracy, n = {first['n']}, 95% interval")
    axes.set_title(f"{labels['dataset']}: {labels['model']}, defense {labels['defense']}")
    axes.set_ylim(0, 1)
    axes.legend()
    key = content_id(_kinship(first))
    path = store.folder / "curves" / f"{labels['dataset']}-{labels['norm']}-{key[:8]}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    return path


def _kinship(record: Record) -> dict[str, object]:
    """What the points of one picture have in common."""
    return {
        "weights": victim_of(record),
        "test": record["dataset"]["test_fingerprint"],
        "query_budget": record["config"]["threat"]["query_budget"],
        **{key: record["labels"][key] for key in _ALONE},
    }
