"""TensorBoard: a folder of event files for every record."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from robustbench_local.tracking.tracker import Entry, Tracker


@dataclass(frozen=True, kw_only=True)
class TensorBoard(Tracker):
    """Settings and numbers for its HPARAMS tab, curves of the training, labels and flags as text.

    `dir` is the folder to start `tensorboard --logdir` with; None: `tensorboard` below the results.
    The run id names the folder of a run there, which is not written again.
    """

    needs: ClassVar[str] = "'robustbench-local[tensorboard]'"

    dir: str | None = None

    def load(self) -> object:
        """Import the writer."""
        from torch.utils.tensorboard import SummaryWriter  # takes seconds

        return SummaryWriter

    def log(self, entry: Entry, results: Path) -> None:
        """Write the folder of a run, unless it is there; it gets its name when it is whole."""
        from torch.utils.tensorboard import SummaryWriter

        place = Path(self.dir).expanduser() if self.dir else results / "tensorboard"
        folder, temporary = place / entry.run_id, place / f".{entry.run_id}.tmp"
        if folder.exists():
            return
        shutil.rmtree(temporary, ignore_errors=True)
        writer = SummaryWriter(str(temporary))
        try:
            for step, numbers in entry.epoch_metrics():
                for key, value in numbers.items():
                    writer.add_scalar(key, value, step)
            writer.add_text("tags", _table(entry.tags()))
            writer.add_text("record", _code(entry.record))
            # Into the same folder: by default it makes another one, named by the time.
            writer.add_hparams(entry.parameters(), entry.metrics(), run_name=".", global_step=0)
        except BaseException:
            writer.close()
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        writer.close()
        os.replace(temporary, folder)


def _table(rows: dict[str, str]) -> str:
    """Markdown, which TensorBoard renders with everything escaped that could be HTML."""
    lines = [f"| {key} | {value.replace('|', '/')} |" for key, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _code(record: object) -> str:
    return "\n".join(f"    {line}" for line in json.dumps(record, indent=1).splitlines())
