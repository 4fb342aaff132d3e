"""`python -m megatron_xielu` is the `megatron-xielu` command."""

import sys

from megatron_xielu import signals
from megatron_xielu.cli import main

# Megatron's checkpoint writer starts a helper process that imports this file once more
if __name__ == "__main__":
    sys.exit(main())
elif __name__ == "__mp_main__":
    # without it nothing can be saved, and a scheduler sends its signals to every process
    signals.ignore()
