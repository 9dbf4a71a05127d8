"""The curve over epsilon shows what the leaderboard counts."""

import pytest
from matplotlib.figure import Figure
from test_leaderboard import add

from robustbench_local.results import Store
from robustbench_local.results.curve import draw_curve


@pytest.fixture
def drawn(monkeypatch):
    """The robust accuracies of every line, in the picture that was saved last."""
    lines = {}

    def savefig(figure, file, **_):
        file.touch()
        (axes,) = figure.axes
        lines.update({line.get_label(): list(line.get_ydata()) for line in axes.get_lines()})

    monkeypatch.setattr(Figure, "savefig", savefig)
    return lines


def test_a_point_is_of_this_victim_and_weaker_evidence_replaces_nothing(tmp_path, drawn):
    store = Store(tmp_path)
    old, new = ({"denoiser": name} for name in ("old", "new"))
    days = (f"2026-01-0{day}" for day in range(1, 9))
    add(store, "old", [0, 0], epsilon=0.1, learned=old, finished=next(days))
    for run_id, robust, averaged in (("a", [0.6, 0.4], 80), ("b", [1.0, 0.8], 20)):
        add(store, run_id, robust, epsilon=0.2, learned=new, judge_draws=10, averaged=averaged,
            finished=next(days))  # fmt: skip
    draw_curve(store, [store.find("a")])
    assert drawn == {"pgd": [1.0, pytest.approx(0.5)]}
