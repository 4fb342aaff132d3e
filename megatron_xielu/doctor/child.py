"""One check in a process of its own: child MODULE:FUNCTION [ARGUMENT]; prints its result as JSON.

A module and not a function of the command, so that ranks can be spawned from it.
"""

from __future__ import annotations

import importlib
import json
import os
import sys

from megatron_xielu.doctor.outcome import Failed, Skipped


def main(path: str, *arguments: str) -> None:
    """Run the check; whatever else is printed goes to standard error."""
    result = os.dup(1)
    os.dup2(2, 1)
    module, function = path.split(":")
    try:
        said = ["pass", getattr(importlib.import_module(module), function)(*arguments)]
    except Failed as failure:
        said = ["FAIL", str(failure)]
    except Skipped as reason:
        said = ["skipped", str(reason)]
    os.write(result, json.dumps(said).encode())
    sys.stderr.flush()
    # threads of a process group may be waiting for each other
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
