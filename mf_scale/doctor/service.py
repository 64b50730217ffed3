"""Weights & Biases: whether it would be reached from here. Information; tracking never stops a run."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from importlib.util import find_spec
from urllib.parse import urlsplit

from mf_scale.config.schema import TrackingConfig
from mf_scale.doctor.finding import OK, WARNING, Finding
from mf_scale.errors import UserError

CHECK = "W&B"
_SECONDS = 2.0
_PROXIES = ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")


def judge_service(tracking: TrackingConfig, environment: Mapping[str, str] = os.environ) -> list[Finding]:
    """One line; no key or address is said but the host's name."""
    if find_spec("wandb") is None:
        return [Finding(CHECK, WARNING, "wandb is not installed: metrics.jsonl alone is written", "pip install wandb.")]
    if tracking.wandb in ("disabled", "offline"):
        return [Finding(CHECK, OK, f"{tracking.wandb}, as asked for")]
    if not environment.get("WANDB_API_KEY") and tracking.wandb == "auto":
        return [Finding(CHECK, OK, "offline: no WANDB_API_KEY here; `mf-scale wandb-sync RUN` sends it later")]
    address = urlsplit(environment.get("WANDB_BASE_URL") or "https://api.wandb.ai")
    host = address.hostname or ""
    if any(environment.get(name) for name in _PROXIES):
        return [Finding(CHECK, OK, f"online at {host} through a proxy, which was not tried")]
    try:
        with socket.create_connection((host, address.port or (80 if address.scheme == "http" else 443)), _SECONDS):
            pass
    except (OSError, UserError) as error:
        what = f"{host} is not reached from here ({getattr(error, 'strerror', None) or error}): the run is kept offline"
        level = WARNING if tracking.wandb == "online" else OK
        return [Finding(CHECK, level, what, "Send it later: mf-scale wandb-sync RUN." if level == WARNING else "")]
    return [Finding(CHECK, OK, f"online at {host}, which answers")]
