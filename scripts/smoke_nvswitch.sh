#!/usr/bin/env bash
# For CI on a node whose GPUs are joined by NVSwitch: correctness, then a short serve with each engine. Skips, with the reason, elsewhere.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/smoke.sh
prepare
has_nvswitch || skip "this node has no NVSwitch; scripts/smoke_pcie.sh is for it"
run_smoke
