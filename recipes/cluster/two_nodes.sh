#!/bin/bash
# The same run on two machines without a scheduler. On both of them:
#   HEAD=node0 GPUS=8 bash recipes/cluster/two_nodes.sh --config recipes/sft.yaml \
#       --config recipes/base/qwen2.5-0.5b-lora.yaml --config recipes/strategy/ddp.yaml --out runs/sft
# HEAD is the first machine, as both can reach it; --out lies on a disk that both see. PORT must be free there.
# accelerate does the same with recipes/cluster/accelerate_2nodes.yaml.
set -euo pipefail
exec python -m torch.distributed.run --nnodes 2 --nproc_per_node "${GPUS:-8}" --rdzv_backend c10d \
    --rdzv_endpoint "${HEAD:?set HEAD to the first machine}:${PORT:-29500}" --rdzv_id "${RUN:-stepkd}" -m stepkd fit "$@"
