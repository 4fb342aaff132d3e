"""`python -m megatron_xielu` is the `megatron-xielu` command."""

import sys

from megatron_xielu.cli import main

if __name__ == "__main__":
    sys.exit(main())
