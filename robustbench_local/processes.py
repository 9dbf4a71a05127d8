"""Several processes that train one model together, each on its share of every batch.

`torchrun` starts them and says so in the environment; without it nothing here does anything. All of
them walk through the same run. What process 0 decides the others are told, through a store of
values and not through collective operations, so that they may wait as long as it takes. What only
one does, such as files, progress and everything after the training, process 0 does.
"""

import atexit
import io
import os
import pickle
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from robustbench_local.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from robustbench_local.training.schedule import Plan

T = TypeVar("T")

TIMEOUT = timedelta(minutes=10)
"""How long one process waits in a step for the others; what else they wait for has no limit."""


LAST_WORDS = 60.0
"""Seconds that process 0, where it keeps the store, waits at its end for the others to read it."""


def number() -> int:
    """Which process this is, from 0; 0 where it is the only one."""
    return int(os.environ["RANK"]) if count() > 1 else 0


def count() -> int:
    """How many processes `torchrun` started; 1 without it."""
    if "RANK" not in os.environ:
        return 1
    return int(os.environ.get("WORLD_SIZE", "1"))


def leads() -> bool:
    """Whether this process is the one that decides, writes and prints."""
    return number() == 0


def own_gpu(found: int) -> int | None:
    """The GPU of this process, of as many as there are on this machine; None without `torchrun`.

    Raises `UserError` where there are fewer GPUs than processes.
    """
    if count() == 1:
        return None
    here = int(os.environ.get("LOCAL_WORLD_SIZE", count()))
    if here > found:
        raise UserError(
            f"{here} processes were started on this machine, which has {found} GPUs; expected one "
            f"GPU for each: type torchrun --nproc_per_node={found}, or device=cpu"
        )
    return int(os.environ.get("LOCAL_RANK", number()))


@dataclass(frozen=True)
class Group:
    """The processes of this run, while they train; `None` stands for one process alone."""

    rank: int
    size: int

    @property
    def leads(self) -> bool:
        """See the function."""
        return self.rank == 0

    def agree(self, decide: Callable[[], T]) -> T:
        """See the function."""
        return agree(decide)

    def share(self, plan: "Plan") -> slice:
        """The rows of every batch that are this process's. Raises `UserError` for unequal parts."""
        each, left = divmod(plan.batch_size, self.size)
        if left:
            fitting = plan.batch_size - left or self.size
            raise UserError(
                f"batches of {plan.batch_size} images cannot be dealt to {self.size} processes; "
                f"expected a multiple of {self.size}: type train.batch_size={fitting}"
            )
        return slice(self.rank * each, (self.rank + 1) * each)

    def average(self, tensors: "Sequence[Tensor]") -> None:
        """Replace every tensor by its mean over the processes, in place."""
        import torch.distributed as dist

        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor /= self.size

    def total(self, tensor: "Tensor") -> "Tensor":
        """The sum over the processes, a new tensor."""
        import torch.distributed as dist

        summed = tensor.clone()
        dist.all_reduce(summed)
        return summed

    def hand_out(self, values: Any, device: "torch.device") -> Any:
        """What process 0 has, tensors included, for all; theirs lie on the CPU."""
        import torch
        import torch.distributed as dist

        file = io.BytesIO()
        if self.leads:
            torch.save(values, file)
        length = torch.tensor([file.getbuffer().nbytes], device=device)
        dist.broadcast(length, 0)
        content = torch.zeros(int(length), dtype=torch.uint8, device=device)
        if self.leads:
            content.copy_(torch.frombuffer(file.getbuffer(), dtype=torch.uint8))
        dist.broadcast(content, 0)
        if self.leads:
            return values
        return torch.load(
            io.BytesIO(content.cpu().numpy().tobytes()), map_location="cpu", weights_only=True
        )

    def parallel(self, module: "nn.Module") -> "nn.Module":
        """The module with the gradients of its weights averaged as they are computed.

        Buffers, such as the batch statistics of a network on the CPU, are those of process 0.
        """
        from torch.nn.parallel import DistributedDataParallel

        # Where a network, or a recipe, leaves weights out of the loss, as it may.
        return DistributedDataParallel(module, find_unused_parameters=True)


_current: Group | None = None


def current() -> Group | None:
    """The group that trains now, None for a process alone."""
    return _current


@contextmanager
def together(device: "torch.device") -> Iterator[None]:
    """Let what is trained inside be trained by all processes, and what comes after by one alone."""
    global _current
    if count() == 1:
        yield
        return
    import torch
    import torch.distributed as dist

    cuda = device.type == "cuda"
    with torch.cuda.device(device) if cuda else nullcontext(), warnings.catch_warnings():
        # Of convolutions of one channel, whose layout is ambiguous.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=_store(f"/group{_next('groups')}"),
            rank=number(),
            world_size=count(),
            timeout=TIMEOUT,
            device_id=device if cuda else None,
        )
        _current = Group(number(), count())
        try:
            yield
            agree(lambda: None)  # nobody leaves while another one still trains
        finally:
            _current = None
        # Not after an error, which ends the process: the others might never come to it.
        dist.destroy_process_group()


def agree(decide: Callable[[], T]) -> T:
    """What `decide` returns in process 0, in all of them; what it raises there is raised in all.

    The value is pickled. Whoever waits does so without an end, since a decision may be as far away
    as the end of somebody else's training; `torchrun` ends all when one fails.
    """
    if count() == 1:
        return decide()
    store, key = _store(), f"decision{_next('decisions')}"
    if leads():
        try:
            value = decide()
        except Exception as error:
            store.set(key, _packed(error))
            raise
        store.set(key, pickle.dumps((False, value)).hex())
        return value
    pause = 0.002
    while not store.check([key]):
        time.sleep(pause)
        pause = min(1.5 * pause, 0.5)
    failed, found = pickle.loads(bytes.fromhex(store.get(key).decode()))
    if failed:
        raise found
    decided: T = found
    return decided


def _packed(error: Exception) -> str:
    try:
        content = pickle.dumps((True, error))
        pickle.loads(content)
    except Exception:  # of somebody's own class
        return pickle.dumps((True, UserError(str(error)))).hex()
    return content.hex()


def tell(sentence: str) -> None:
    """Print what ended the run to standard error; of several processes the first one does."""
    if count() > 1:
        try:
            if _store().add("told", 1) > 1:
                return
        except Exception:  # the others are gone already: somebody has to say it
            pass
    print(sentence, file=sys.stderr, flush=True)


def _store(place: str = "") -> Any:
    """Where the processes leave values for each other."""
    import torch.distributed as dist

    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    prefix = f"robustbench_local/{attempt}{place}"
    return dist.PrefixStore(prefix, _connect())  # type: ignore[attr-defined]


@cache
def _connect() -> Any:
    """The store that `torchrun` keeps; else process 0 does."""
    import torch.distributed as dist

    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(  # type: ignore[attr-defined]
        os.environ.get("MASTER_ADDR", "localhost"),
        int(os.environ.get("MASTER_PORT", "29500")),
        count(),
        is_master=leads() and not kept,
        timeout=TIMEOUT,
        wait_for_workers=False,
    )
    if not kept:
        atexit.register(_leave, store)
    return store


def _leave(store: Any) -> None:
    """Say so; whoever keeps the store leaves last, or the others would ask a store that is gone."""
    deadline = time.monotonic() + LAST_WORDS
    try:
        left = store.add("left", 1)
        while leads() and left < count() and time.monotonic() < deadline:
            time.sleep(0.05)
            left = store.add("left", 0)
    except Exception:  # process 0 was killed
        return


_made: dict[str, int] = {}


def _next(name: str) -> int:
    """How many there were before: equal in all processes, which all pass through the same."""
    _made[name] = _made.get(name, -1) + 1
    return _made[name]
