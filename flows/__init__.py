"""What runs, and in which order."""

import logging
import os

# Prefect reads these when it is imported. An installed package brings no pyproject.toml, so they stand here.
for _name, _value in {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",  # 20 is too short where several start at once
    "PREFECT_LOGGING_EXTRA_LOGGERS": "tasks",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ.setdefault(_name, _value)

# Where it can it would fetch compiled code from the hub, and where it cannot it tells the user, at every start, to let it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
