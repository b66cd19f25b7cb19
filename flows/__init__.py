"""What runs, and in which order."""

import os

# Prefect reads its own when it is imported. An installed package brings no pyproject.toml, so they stand here.
for _name, _value in {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",  # 20 is too short where several start at once
    "PREFECT_LOGGING_EXTRA_LOGGERS": "tasks",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "60",  # for the zombie automation (deployments/automations.yaml)
    "TOKENIZERS_PARALLELISM": "false",
    # oneDNN, and torch above it, keep 1,024 compiled products each, one a shape, and no two packed passes have one shape: a CPU's
    # memory would grow by some 40 MB a step, for nothing in time.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16",
    "LRU_CACHE_CAPACITY": "16",
}.items():
    os.environ.setdefault(_name, _value)
