"""Weights & Biases, as far as it can be judged without it: is there an account, and is it wanted?"""

from __future__ import annotations  # so that --doctor runs on a Python that is too old, and says so

import netrc
import os
from urllib.parse import urlparse

from runner.errors import InputError, did_you_mean

PROJECT = "lightning-lectures"
MODES = ("online", "offline", "disabled")


def wandb_mode() -> str:
    """Return `WANDB_MODE`, else online if a key is configured, else offline: never a prompt."""
    if mode := os.environ.get("WANDB_MODE"):
        mode = {"dryrun": "offline", "run": "online"}.get(mode, mode)  # wandb's older words
        if mode not in MODES:
            raise InputError(f"WANDB_MODE: {mode!r} is none of wandb's{did_you_mean(mode, MODES)}")
        return mode
    return "online" if has_key() else "offline"


def wandb_host() -> str:
    """Return the name of wandb's server."""
    return urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or "none"


def has_key() -> bool:
    """Return whether a key for wandb's server is configured, right or wrong: nobody is asked."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return bool(netrc.netrc(os.environ.get("NETRC")).authenticators(wandb_host()))
    except (OSError, netrc.NetrcParseError):
        return False
