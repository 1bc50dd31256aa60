#!/usr/bin/env bash
# Run on every node before training: does Python find the package, and all of the node's devices?
set -euo pipefail
# shellcheck source=examples/env/select.sh
. examples/env/select.sh

found=$(python -c '
import torch
from megatron_attnedit.device import bootstrap
accelerator = bootstrap()
print(torch.get_device_module(accelerator.device).device_count(), accelerator.kind)') || {
    echo "error: node $(hostname): Python does not start the package" >&2
    exit 1
}
echo "node $(hostname): $found"
if [ "$ATTNEDIT_ENV" = cpu ]; then exit 0; fi # as many processes as asked for share the cores
if [ "${found##* }" = cpu ] || [ "${found%% *}" -ne "$ATTNEDIT_DEVICES" ]; then
    echo "error: node $(hostname): found $found, expected $ATTNEDIT_DEVICES devices of" \
        "ATTNEDIT_ENV=$ATTNEDIT_ENV" >&2
    exit 1
fi
