"""Downloads that never hang, never leave anything torn and are checked before they count."""

import errno
import http.client
import os
import queue
import shutil
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from robustbench_local.data.source import one_line
from robustbench_local.errors import UserError

PROBE_SECONDS = 8.0
_STALL_SECONDS = 15.0
_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS})


class UnreachableError(Exception):
    """The network didn't give the files; the text is a clause that says what was tried."""


def fetch(
    *,
    data_dir: Path,
    folder: str,
    urls: Sequence[str],
    download: Callable[[Path], None],
    verify: Callable[[Path], object],
    present: Callable[[Path], bool],
) -> bool:
    """Download `folder` into `data_dir`, all of it or nothing.

    `download` fills a staging root, `verify` raises on a broken one, `present` tells whether a root
    has the files. Returns whether this call downloaded them; another process may have been first.
    Raises `UnreachableError`, or `UserError` for altered files and a folder that can't be written.
    """
    # Asked before the lock: whoever has no network must not wait for someone else's download.
    if not any_reachable(urls, PROBE_SECONDS):
        raise UnreachableError(f"no answer from {' or '.join(urls)}")
    staging = data_dir / f".download-{folder.replace('/', '-')}"
    target = data_dir / folder
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{staging}.lock"):
            if present(data_dir):
                return False
            # Left by a killed download; under the lock nobody else is using it.
            shutil.rmtree(staging, ignore_errors=True)
            try:
                _download(download, staging, " or ".join(urls))
                verify(staging)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(staging / folder, target)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"the download could not be put into {target} ({one_line(error)}), a folder that can "
            "be written and is empty was expected: clear it or type paths.data=DIR"
        ) from error
    return True


def _download(download: Callable[[Path], None], staging: Path, tried: str) -> None:
    try:
        staging.mkdir()
        with _socket_timeout(_STALL_SECONDS):
            download(staging)
    except (OSError, RuntimeError, EOFError, http.client.HTTPException) as error:
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            raise
        # torchvision raises the same type for a dead mirror and for a wrong hash; only a wrong hash
        # must never be answered with other data.
        if "corrupted" in str(error):
            raise UserError(
                f"the files downloaded from {tried} are not the published ones (MD5 differs): try "
                "again, or type paths.data=DIR with a folder that holds them"
            ) from error
        raise UnreachableError(f"the download from {tried} broke off, {one_line(error)}") from error


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """Bound every wait on the network; torchvision opens its URLs without a limit."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def any_reachable(urls: Sequence[str], limit: float) -> bool:
    """Tell within `limit` seconds whether one of the addresses answers, proxies included."""
    answers: queue.SimpleQueue[bool] = queue.SimpleQueue()
    deadline = time.monotonic() + limit
    for url in urls:
        # Looking up a name has no timeout of its own and can hang for minutes, so it is left
        # behind in a thread that does not keep the program alive.
        threading.Thread(target=_ask, args=(url, limit, answers), daemon=True).start()
    for _ in urls:
        try:
            if answers.get(timeout=max(0.0, deadline - time.monotonic())):
                return True
        except queue.Empty:
            return False
    return False


def _ask(url: str, timeout: float, answers: "queue.SimpleQueue[bool]") -> None:
    answers.put(opens(url, timeout))


def opens(url: str, timeout: float) -> bool:
    """Tell whether an address gives a file; reads nothing of it."""
    request = urllib.request.Request(url, headers={"User-Agent": "robustbench_local"})
    try:
        with urllib.request.urlopen(request, timeout=timeout):
            return True
    except urllib.error.HTTPError as error:
        error.close()
        return False
    except (OSError, ValueError, http.client.HTTPException):
        return False
