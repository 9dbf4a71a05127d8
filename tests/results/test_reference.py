"""The shipped records are readable, and the shipped leaderboard is what they fold to."""

from pathlib import Path

from robustbench_local.results import Store
from robustbench_local.results.leaderboard import fold

REFERENCE = Path(__file__).parents[2] / "results" / "reference"


def test_the_shipped_leaderboard_is_folded_from_the_shipped_records():
    store = Store(REFERENCE)
    assert len(list(store.all())) == len(list(store.records.glob("*.json"))) > 0
    assert (REFERENCE / "leaderboard.csv").read_text() == fold(store).to_csv(index=False)
