"""What a training consists of on its way: the moving parts, and what happened so far."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from robustbench_local.training.averaging import Average
from robustbench_local.training.schedule import Schedule

State: TypeAlias = dict[str, Any]


class Training:
    """A model with its optimiser, the average of its weights, and the precision it trains in."""

    def __init__(self, model: nn.Module, schedule: Schedule, device: torch.device) -> None:
        self.model = model
        self.optimizer = schedule.make_optimizer(model)
        self.average = Average(model, schedule.average_decay)
        self._device = device
        self._mixed = schedule.mixed_precision and device.type == "cuda"
        native = self._mixed and torch.cuda.is_bf16_supported(including_emulation=False)
        self._type = torch.bfloat16 if native else torch.float16
        # bfloat16 has the range of float32 and needs no scaling.
        self.scaler = torch.amp.GradScaler(device.type, enabled=self._mixed and not native)

    def precision(self) -> AbstractContextManager[Any]:
        """The context for forward passes: mixed precision where it was asked for, on CUDA."""
        return torch.autocast(self._device.type, self._type) if self._mixed else nullcontext()

    def state(self) -> State:
        """Everything that the next step depends on."""
        return {
            "model": self.model.state_dict(),
            "average": self.average.model.state_dict(),
            "updates": self.average.updates,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, state: State) -> None:
        """Take up where `state` was taken."""
        self.model.load_state_dict(state["model"])
        self.average.model.load_state_dict(state["average"])
        self.average.updates = int(state["updates"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])


class Course:
    """The epochs so far, and the weights of the best one."""

    def __init__(self) -> None:
        self.history: list[dict[str, Any]] = []
        self.selected = 0  # epoch, from 1; 0 before there is one
        self.weights: dict[str, Tensor] = {}

    @property
    def epoch(self) -> int:
        """Number of whole epochs."""
        return len(self.history)

    def over(self, epochs: int, patience: int | None) -> bool:
        """Whether training ends here: after all epochs, or `patience` in a row without a better.

        Those of a warm-up do not count against it.
        """
        worse = sum(entry["settled"] for entry in self.history[self.selected :])
        return self.epoch >= epochs or (patience is not None and worse >= patience)

    def add(self, entry: dict[str, Any], model: nn.Module) -> None:
        """Note an epoch, and keep its weights where it is the best so far.

        Robust validation accuracy decides where it was measured, else validation accuracy; the
        later epoch wins a tie. An epoch of the warm-up counts like any other, since it was measured
        at the full budget too: a training that collapses when epsilon has grown is rolled back
        behind that.
        """
        self.history.append(entry)
        if self.selected == 0 or _score(entry) >= _score(self.history[self.selected - 1]):
            self.selected = int(entry["epoch"])
            self.weights = {
                name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
                for name, value in model.state_dict().items()
            }

    def summary(self) -> dict[str, Any]:
        """What a finished training is remembered by; JSON values only.

        `seconds` is what all epochs took, in however many processes.
        """
        best = self.history[self.selected - 1]
        names = ("validation_accuracy", "robust_validation_accuracy")
        return {
            "history": self.history,
            "epoch": self.selected,
            "validation": {name: best[name] for name in names if best[name] is not None},
            "seconds": sum(float(entry["seconds"]) for entry in self.history),
        }

    def state(self) -> State:
        """The course as plain values and tensors."""
        return {"history": self.history, "selected": self.selected, "weights": self.weights}

    def restore(self, state: State) -> None:
        """Take up where `state` was taken."""
        self.history = [dict(entry) for entry in state["history"]]
        self.selected = int(state["selected"])
        self.weights = dict(state["weights"])


def _score(entry: dict[str, Any]) -> float:
    robust = entry["robust_validation_accuracy"]
    return float(entry["validation_accuracy"] if robust is None else robust)
