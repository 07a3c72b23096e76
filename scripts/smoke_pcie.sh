#!/usr/bin/env bash
# For CI on a node whose GPUs are joined by PCIe: correctness, then a short serve with each engine. Skips, with the reason, elsewhere.
# Without peer access every strategy falls back to NCCL, and the serve shows that this is said and works.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/smoke.sh
prepare
if has_nvswitch; then skip "this node has NVSwitch; scripts/smoke_nvswitch.sh is for it"; fi
run_smoke
