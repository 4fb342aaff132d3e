#!/bin/bash
# Pretrain on machines that no scheduler manages. Start the same on each of them:
#   HEAD=node0 NODES=4 GPUS=8 examples/multinode_torchrun.sh llama-3b-xielu data.path=/data/books
# HEAD is the first node's name or address as all of them see it. A node that is lost may be
# replaced: give the command there. When the head is lost all others end: start all of them again,
# and the run goes on from its last save.
set -euo pipefail
: "${HEAD:?the name or address of the first node}" "${NODES:?how many nodes}" "${GPUS:?ranks of each}"
exec "${PYTHON:-python3}" -m megatron_xielu launch local \
    --nodes "$NODES" --gpus-per-node "$GPUS" --head "$HEAD" --submit "$@"
