"""Where data lies on this machine, and how what is missing is fetched."""

from __future__ import annotations  # so that --doctor runs on a Python that is too old, and says so

import contextlib
import io
import os
import socket
from collections.abc import Callable
from pathlib import Path

from runner.errors import one_line


def data_dir() -> Path:
    """Return the folder that datasets are kept in: `DATA_DIR`, else `data`."""
    return Path(os.environ.get("DATA_DIR") or "data")


def download(what: str, folder: Path, fetch: Callable[[], object]) -> str:
    """Call `fetch`, which downloads `what` to `folder`; return why it could not, or an empty string.

    Its progress bars, on stderr, are shown; what it prints is not. What is left of folders without files is removed.
    """
    print(f"{what}: not in {folder}, downloading", flush=True)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(15)  # a network that swallows packets must not hang the run
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            fetch()
    except (OSError, RuntimeError) as error:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()  # only if empty
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return one_line(lines[-1])  # torchvision's first ones name the mirrors
    finally:
        socket.setdefaulttimeout(timeout)
    return ""
