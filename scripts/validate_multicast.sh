#!/usr/bin/env bash
# For a node with NVSwitch whose owner wants to know whether multicast works there: proves it, compares bits, and measures
# it beside calls that push and beside NCCL. This is the only program here that asks for a multicast object by itself, so it
# refuses where the user has switched multicast off. Settings:
#   VALIDATE_GPUS  how many GPUs (default: all)
#   VALIDATE_OUT   where the record goes (default: build/multicast.json)
#   DEMO_PYTHON    an interpreter that has torch and this package (default: an environment is made)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

refuse() {
  echo "REFUSED: $1" >&2
  exit 2
}

for switch in TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NCCL_NVLS_ENABLE=0; do
  name=${switch%=*}
  if [[ $(tr -d '[:space:]' <<<"${!name:-}") == "${switch#*=}" ]]; then
    refuse "$switch switches multicast off on this machine; whoever set it had a reason. Nothing was asked of the driver."
  fi
done

source scripts/smoke.sh
prepare
has_nvswitch || skip "this node has no NVSwitch"
out=${VALIDATE_OUT:-build/multicast.json}
mkdir -p "$(dirname "$out")"
# The kernels first, behind a switch that other kernels play: these tests set both switches for themselves.
step "kernels, without multicast memory" "$python" -m pytest -q tests/gpu/test_multishot.py
step "proof, bits and times" "$python" benchmarks/multicast.py --gpus "${VALIDATE_GPUS:-$gpus}" --out "$out"
printf '\n== summary\n'
printf '%s\n' "${summary[@]}"
exit "$failed"
