"""Weights & Biases, as far as it can be judged without it: is there an account, and is it wanted?"""

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
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        has_key = bool(os.environ.get("WANDB_API_KEY")) or bool(
            netrc.netrc(os.environ.get("NETRC")).authenticators(host)
        )
    except (OSError, netrc.NetrcParseError):
        has_key = False
    return "online" if has_key else "offline"
