"""A local benchmark of adversarial robustness: train, defend, attack, judge, record, tabulate."""

__version__ = "0.1.0"
