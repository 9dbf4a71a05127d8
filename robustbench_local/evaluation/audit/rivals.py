"""Other attacks that should not find what this one misses.

Sources: Carlini et al. 2019 (arXiv:1902.06705, section 5), Croce and Hein 2020 (arXiv:2003.01690).
"""

from typing import Any

from torch import Tensor

from robustbench_local.attacks import PGD, Attack, Noise
from robustbench_local.evaluation.audit.case import Case
from robustbench_local.evaluation.audit.check import Check, count, found
from robustbench_local.evaluation.audit.comparison import broken_besides
from robustbench_local.evaluation.audit.trials import Face
from robustbench_local.evaluation.audit.variations import black_box, one_step, open_to
from robustbench_local.threat import ThreatModel
from robustbench_local.types import Images, Labels, Model


def weaker_than_fgsm(case: Case) -> Check:
    """One gradient step of the same size, on what resists."""
    apart = _besides(case, "fgsm", one_step(case.attack))
    measured = {**_measured(case), "broken_besides": float(apart.sum())}
    why = _told(case, apart, "one gradient step")
    return found("weaker_than_fgsm", case.differs(apart), measured, why)


def noise_as_strong(case: Case) -> Check:
    """Random points of the budget, on what resists."""
    draws = case.config.noise_draws
    apart = _besides(case, "noise", Noise(samples=draws, seed=case.attack.seed))
    measured = {**_measured(case), "broken_besides": float(apart.sum()), "draws": draws}
    why = _told(case, apart, f"noise of the same size ({draws} draws)")
    return found("noise_as_strong", case.differs(apart), measured, why)


def weaker_than_black_box(case: Case) -> Check:
    """A search with scores alone, and images made on other models, on what resists.

    A query budget of the threat model holds for the search too.
    """
    search, queries = black_box(case.attack, case.oracle, case.config.black_box_queries)
    rivals = {f"{type(search).__name__} ({queries} queries)": _besides(case, "black box", search)}
    if case.threat.norm != "l0":
        carried = PGD(early_stop=False, best_iterate=False, seed=case.attack.seed)
        for name, model in case.sources.items():
            face = _instead(model)
            rivals[f"transfer from {name}"] = _besides(case, f"transfer {name}", carried, face)
    points = case.config.black_box_points
    raised = [name for name, apart in rivals.items() if case.differs(apart, points)]
    strongest = max(raised or rivals, key=lambda name: float(rivals[name].sum()))
    sums = {name: float(apart.sum()) for name, apart in rivals.items()}
    measured = {**_measured(case), "broken_besides": sums}
    why = _told(case, rivals[strongest], strongest)
    return found("weaker_than_black_box", bool(raised), measured, why)


def _besides(case: Case, name: str, rival: Attack, face: Face | None = None) -> Tensor:
    """What a rival breaks of each image that resists the attack, (N,)."""
    threat = open_to(case.threat, rival)
    other = case.trials.run(name, rival, threat, rows=case.survivors, face=face)
    return broken_besides(case.base.correct, other)


def _instead(model: Model) -> Face:
    def face(x: Images, y: Labels, threat: ThreatModel) -> Model:
        return model

    return face


def _measured(case: Case) -> dict[str, Any]:
    return {"resisting": len(case.survivors), "n": len(case.trials)}


def _told(case: Case, apart: Tensor, what: str) -> str:
    if len(case.survivors) == 0:
        return "no image resists the attack"
    images = max(0.0, float(apart.sum()))
    resisting = count(len(case.survivors), "image")
    return f"{what} breaks {images:.3g} of the {resisting} that the attack did not"
