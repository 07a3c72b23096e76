#!/usr/bin/env bash
# Builds release wheels into dist/ with kernels for every architecture: scripts/build_wheel.sh [PYTHON...]
# One abi3 wheel serves Python 3.12 and newer; 3.11 gets its own. Default: every one of python3.11 and python3.12 found.
#   LLM_ALLREDUCE_CUDA_ARCHS  compute capabilities without the dot; default 80;86;89;90;100;120
#   LLM_ALLREDUCE_NVCC=wheels compile with nvcc from PyPI wheels although the machine has one
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

interpreters=("$@")
if ((${#interpreters[@]} == 0)); then
  for candidate in python3.11 python3.12; do
    if "$candidate" --version >/dev/null 2>&1; then interpreters+=("$candidate"); fi
  done
fi
if ((${#interpreters[@]} == 0)); then
  echo "neither python3.11 nor python3.12 is on PATH; name an interpreter: scripts/build_wheel.sh python3" >&2
  exit 1
fi
for interpreter in "${interpreters[@]}"; do
  echo "building with $("$interpreter" --version)"
  "$interpreter" -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
done
ls -l dist/*.whl
