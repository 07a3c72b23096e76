#!/usr/bin/env bash
# Tries what would be released, for every night: builds wheels and sdist, installs each in a bare environment that has
# nothing but torch, away from the sources, and lets `llm-allreduce check` look at it. Takes minutes.
#   LLM_ALLREDUCE_CUDA_ARCHS  default here: 90, to be quick; all six for a release
#   DEMO=1                    serve the demo from the first wheel, too, with vLLM
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
export LLM_ALLREDUCE_CUDA_ARCHS=${LLM_ALLREDUCE_CUDA_ARCHS:-90} LLM_ALLREDUCE_NVCC=wheels
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# bare_environment FOLDER PYTHON
bare_environment() {
  "$2" -m venv "$1"
  pip_install "$1" "torch==$TORCH_VERSION"
}

# check_in FOLDER: away from the sources, which Python would find first.
check_in() { (cd "$work" && "$1/bin/llm-allreduce" --version && "$1/bin/llm-allreduce" check); }

rm -rf dist
scripts/build_wheel.sh "$@"
for wheel in dist/*.whl; do
  case $wheel in *cp311-cp311*) python=python3.11 ;; *) python=python3.12 ;; esac
  "$python" --version >/dev/null 2>&1 || { echo "$wheel: not tried, there is no $python"; continue; }
  echo "== $wheel"
  bare_environment "$work/of-wheel" "$python"
  pip_install "$work/of-wheel" "$wheel"
  check_in "$work/of-wheel"
  if [[ -n ${DEMO:-} ]]; then
    install_vllm "$work/of-wheel"
    has_nvidia_gpus || install_cpu_ops "$work/of-wheel" vllm
    (cd "$work" && "$work/of-wheel/bin/llm-allreduce" demo)
    DEMO=
  fi
  rm -rf "$work/of-wheel"
done
echo "== the sdist, on a machine without a CUDA toolkit"
bare_environment "$work/of-sdist" "$(find_python)"
pip_install "$work/of-sdist" dist/*.tar.gz
check_in "$work/of-sdist"
