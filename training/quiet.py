"""Nothing phones home: every library's telemetry and version check is off, here and in every Ray process."""

from __future__ import annotations

import os

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # whatever it logs as an error it also raises
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
}


def be_quiet() -> None:
    """Set the variables for this process and its children; what the user has set stays."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
