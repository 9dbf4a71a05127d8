"""What Hydra calls for each run. It lies in a module of its own so that workers can import it."""

import os
import sys
import threading
import time
import traceback
from contextlib import suppress
from multiprocessing import parent_process
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from robustbench_local import processes
from robustbench_local.cli_errors import CONF, EXPECTED, sentence, told_file
from robustbench_local.sweeps.journal import Journal

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from robustbench_local.results import Record

FAILURES: list[str] = []
"""Sentences about the runs of this command that failed, where no journal is kept."""


def task(config: "DictConfig") -> "list[Record] | None":
    """One run: of a sweep with a journal, of another sweep, or alone."""
    # A light file: Hydra's plugins import it for --help, which must not wait for torch.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a user's own classes, by model._target_
    journal = Journal.current()
    if journal is not None:
        _run_journalled(config, journal)
        return None
    try:
        from robustbench_local.run import run_from_hydra

        return run_from_hydra(config)
    except EXPECTED as error:  # the other runs of a sweep go on
        if processes.count() > 1:
            _end_all(sentence(error, CONF))
        FAILURES.append(sentence(error, CONF))
        print(f"error: {FAILURES[-1]}", file=sys.stderr)
        return None
    except OSError:
        raise
    except Exception as error:  # of somebody's own class, or a defect of ours
        if processes.count() > 1 or HydraConfig.get().mode != RunMode.MULTIRUN:
            raise
        traceback.print_exc()
        FAILURES.append(str(error))
        return None


def _run_journalled(config: "DictConfig", journal: Journal) -> None:
    """Run and say how it ended, but for a kill, which says nothing."""
    info = journal.info()
    hydra = HydraConfig.get()
    with suppress(OSError):  # on another machine it may not be there
        os.chdir(info.folder)
    if info.folder not in sys.path:
        sys.path.insert(0, info.folder)
    entry = journal.begin(hydra.job.num, hydra.overrides.task)
    began = time.monotonic()
    error, run_ids = "", []
    _RUNNING.acquire()
    try:
        _end_with(info.pid)  # while the run holds the lock: not before it has ended
        from robustbench_local.sweeps.devices import settle

        settle(journal, info, str(config.device))
        from robustbench_local.run import run_from_hydra

        here = os.getpid() == info.pid
        records = run_from_hydra(config, silent=not info.alone, live=here)
        run_ids = [record["run_id"] for record in records]
    except KeyboardInterrupt:
        journal.forget(entry)
        raise
    except EXPECTED as failure:
        error = sentence(failure, CONF)
    except OSError as failure:
        error = told_file(failure)
    except (Exception, SystemExit) as failure:  # of somebody's own class, or a defect of ours
        traceback.print_exc()
        error = f"{type(failure).__name__}: {failure}"
    finally:
        _RUNNING.release()
    if error and processes.count() > 1:
        _end_all(error)
    journal.end(entry, time.monotonic() - began, run_ids=run_ids, error=error)


def _end_all(error: str) -> None:
    """End this process, and with it all that train together: they would lose each other."""
    processes.tell(f"error: {error}")
    sys.exit(1)


_RUNNING = threading.Lock()
"""Held while this process runs something."""


def _end_with(launcher: int) -> None:
    """Have a child of the launching process end after its run where that process was killed.

    Else those of joblib would wait for more, with what they hold of a GPU; also one whose first run
    begins when the launching process is gone already.
    """
    parent = parent_process()

    def wait() -> None:
        while os.getppid() == launcher:
            time.sleep(0.5)
        with _RUNNING:
            os._exit(1)

    child = os.getppid() == launcher or (parent is not None and parent.pid == launcher)
    if child and not any(thread.name == _WATCH for thread in threading.enumerate()):
        threading.Thread(target=wait, name=_WATCH, daemon=True).start()


_WATCH = "robustbench_local: does the launching process live"
