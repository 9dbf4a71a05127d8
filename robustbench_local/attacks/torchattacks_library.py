"""Every attack of torchattacks by its name there."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from robustbench_local.attacks.known import Known
from robustbench_local.attacks.library import LibraryAttack
from robustbench_local.attacks.victim import Victim
from robustbench_local.types import Images, Labels, Norm

_LINF: Mapping[Norm, Any] = {"linf": "Linf"}
_STEPS = Known(norms=_LINF, step="alpha")
_LINF_L2: Mapping[Norm, Any] = {"linf": "Linf", "l2": "L2"}
_COLOUR = Known(norms=_LINF, radius="max_epsilon", channels=3)
_QUIET = {"verbose": False}

KNOWN: Mapping[str, Known] = {
    "APGD": Known(norms=_LINF_L2, paper={"steps": 100}, fixed=_QUIET, target="no"),
    "APGDT": Known(
        norms=_LINF_L2,
        paper={"steps": 100},
        fixed={"n_classes": 0, **_QUIET},
        target="no",
        classes=4,  # its targeted DLR loss looks at the fourth largest logit
    ),
    "BIM": _STEPS,
    "DIFGSM": _STEPS,
    # These two and UPGD's margin loss take the largest logit after setting others to 0.
    "EADEN": Known(
        norms={"l1": None, "l2": None}, radius=None, form="positive", leaves_the_box=True
    ),
    "EADL1": Known(norms={"l1": None}, radius=None, form="positive", leaves_the_box=True),
    "EOTPGD": _STEPS,
    # Its l1 raises (a variable without a value), and a target only says which boundary it looks
    # at: any other error ends it.
    "FAB": Known(
        norms=_LINF_L2, paper={"steps": 100}, fixed={"n_classes": 0, **_QUIET}, target="no"
    ),
    "FFGSM": _STEPS,
    "FGSM": Known(norms=_LINF),
    # Untargeted it takes (label + 1) modulo 10 for its target, whatever classes there are.
    "JSMA": Known(norms={"l0": None}, radius=None, target="only", one_by_one=True),
    "Jitter": Known(norms=_LINF, step="alpha", form="positive"),  # scales by the largest logit
    "MIFGSM": _STEPS,
    "NIFGSM": _STEPS,
    "OnePixel": Known(
        norms={"l0": None},
        needs="scores",
        radius="pixels",
        paper={"popsize": 400, "steps": 100},
        one_by_one=True,
    ),
    "PGD": _STEPS,
    "PGDL2": Known(norms={"l2": None}, step="alpha"),
    "PGDRS": _STEPS,
    "PGDRSL2": Known(norms={"l2": None}, step="alpha"),
    "PIFGSM": Known(norms=_LINF, radius="max_epsilon", channels=3, target="no"),
    "PIFGSMPP": _COLOUR,
    "Pixle": Known(norms={"l0": None}, needs="scores", radius=None, one_by_one=True),
    "RFGSM": _STEPS,
    "SINIFGSM": _STEPS,
    "SPSA": Known(
        norms=_LINF,
        needs="scores",
        must_give={"nb_iter": "its default of 1 moves each pixel by lr=0.01 at most, once"},
    ),
    "SparseFool": Known(norms={"l0": None}, radius=None, target="no", one_by_one=True),
    "Square": Known(norms=_LINF_L2, needs="scores", fixed=_QUIET),
    "TIFGSM": Known(norms=_LINF, step="alpha", channels=3),
    "TPGD": Known(norms=_LINF, step="alpha", target="no"),
    "UPGD": Known(norms=_LINF, step="alpha", form="positive"),
    "VMIFGSM": _STEPS,
    "VNIFGSM": _STEPS,
}

REFUSED: Mapping[str, str] = {
    "AutoAttack": "it runs 10 steps where the authors' runs 100 and is not AutoAttack; type "
    "attack=autoattack (the authors' code) or attack=standard",
    "CW": "it cannot move pixels at exactly 0 or 1, is wrong where logits are negative, and does "
    "not search for c; type attack=cw",
    "DeepFool": "it takes steps of no use at pixels the box holds and stalls, leaving images that "
    "a step elsewhere would break; type attack=deepfool",
    "GN": "its noise knows no budget; type attack=noise",
    "LGV": "it trains models of its own from a data loader, which a name cannot give it; type "
    "attack=transfer",
    "MultiAttack": "it is a list of other attacks; run these one by one, or type attack=standard",
    "VANILA": "it returns the images as they are; clean accuracy is in every record",
}

_NEED_TRUE_LABELS = frozenset({"Jitter", "UPGD"})
"""Targeted, these look at the true labels too. All others take the targets in their place.

SPSA and PIFGSMPP never ask for the targets: given true labels they would move towards these.
"""


@dataclass(frozen=True, kw_only=True)
class TorchAttacks(LibraryAttack):
    """An attack of torchattacks (Kim 2020, arXiv:2010.01950) by `name`, see `LibraryAttack`.

    Corrected: negative logits (EADL1, EADEN, UPGD with the margin loss), targets (SPSA, PIFGSMPP),
    the number of classes (APGDT, FAB), graphs and gradients left behind, reseeded generators; the
    papers' steps for APGD, APGDT and FAB, and the paper's population for OnePixel. What cannot be
    put right is refused with the reason.
    """

    library: ClassVar[str] = "torchattacks"
    package: ClassVar[str] = "torchattacks"
    known: ClassVar[Mapping[str, Known]] = KNOWN
    refused: ClassVar[Mapping[str, str]] = REFUSED

    name: str = "MIFGSM"

    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """The parameters of the library's attack by name, without the model."""
        import torchattacks

        found = inspect.signature(getattr(torchattacks, self.name)).parameters
        return {key: value for key, value in found.items() if key != "model"}

    def call(
        self,
        victim: Victim,
        x: Images,
        y: Labels,
        wanted: Labels | None,
        arguments: dict[str, Any],
    ) -> Tensor:
        """Run the library's attack; `y` are the true labels, `wanted` the targets if any."""
        import torchattacks

        attack = getattr(torchattacks, self.name)(victim, **arguments)
        attack.set_device(x.device)
        if wanted is not None:
            if self.name in _NEED_TRUE_LABELS:
                attack.set_mode_targeted_by_function(lambda images, labels: wanted, quiet=True)
            else:
                attack.set_mode_targeted_by_label(quiet=True)
                y = wanted
        result: Tensor = attack(x.clone(), y.clone())
        return torch.as_tensor(result)
