"""`python -m megatron_xielu` is the `megatron-xielu` command."""

import sys

from megatron_xielu.cli import main

# Megatron's checkpoint writer starts a helper process that imports this file once more
if __name__ == "__main__":
    sys.exit(main())
