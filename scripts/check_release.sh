#!/usr/bin/env bash
# Tries what would be released, for every night: builds wheels for every architecture and the sdist, installs each in a bare
# environment that has nothing but torch, away from the sources, and lets `llm-allreduce check` look at it. The machine
# code of the first wheel is then held to what tests ask of it, on each architecture: no spills, registers, sums in the
# switch. Takes some minutes for each architecture and wheel.
#   scripts/check_release.sh [PYTHON...]: default every one of python3.11, python3.12 and python3.13 found. Each tries the
#   wheel that is for it: of 3.12 and newer, one built by the oldest that there is.
#   LLM_ALLREDUCE_CUDA_ARCHS  of the wheels; default: all six, as for a release. 90 is quick, and all of the sdist
#   DEMO=1                    serve the demo from the first wheel, too, with vLLM
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
export LLM_ALLREDUCE_CUDA_ARCHS=${LLM_ALLREDUCE_CUDA_ARCHS:-80;86;89;90;100;120} LLM_ALLREDUCE_NVCC=wheels
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# bare_environment FOLDER PYTHON
bare_environment() {
  "$2" -m venv "$1"
  pip_install "$1" "torch==$TORCH_VERSION"
}

# check_in FOLDER: away from the sources, which Python would find first.
check_in() { (cd "$work" && "$1/bin/llm-allreduce" --version && "$1/bin/llm-allreduce" check); }

# check_code FOLDER: what tests say of the library that is installed there. They run beside what they read of the sources,
# but not beside the package, which Python would find first.
check_code() {
  echo "== machine code for $LLM_ALLREDUCE_CUDA_ARCHS"
  install_extras "$1" test
  mkdir -p "$work/tree/llm_allreduce_plugin"
  cp -r pyproject.toml tests csrc scripts benchmarks configs "$work/tree"
  cp llm_allreduce_plugin/_C.pyi "$work/tree/llm_allreduce_plugin"
  (cd "$work/tree" && "$1/bin/python" -m pytest -q tests/unit/test_in_switch_code.py tests/unit/test_native*.py)
}

# minor_of PYTHON: 12 for Python 3.12
minor_of() { "$1" -c 'import sys; print(sys.version_info.minor)'; }

pythons=("$@")
if ((${#pythons[@]} == 0)); then
  for candidate in python3.11 python3.12 python3.13; do
    if "$candidate" --version >/dev/null 2>&1; then pythons+=("$candidate"); fi
  done
fi
if ((${#pythons[@]} == 0)); then
  echo "none of python3.11 to python3.13 is on PATH; name an interpreter: scripts/check_release.sh PYTHON" >&2
  exit 1
fi
builders=()
oldest=
for python in "${pythons[@]}"; do
  minor=$(minor_of "$python")
  if ((minor == 11)); then
    builders+=("$python")
  elif [[ -z $oldest ]] || ((minor < $(minor_of "$oldest"))); then
    oldest=$python
  fi
done
if [[ -n $oldest ]]; then builders+=("$oldest"); fi

rm -rf dist
scripts/build_wheel.sh "${builders[@]}"
for python in "${pythons[@]}"; do
  wheel=(dist/*abi3*.whl)
  if (($(minor_of "$python") == 11)); then wheel=(dist/*cp311-cp311*.whl); fi
  echo "== ${wheel[0]}, $("$python" --version)"
  bare_environment "$work/of-wheel" "$python"
  pip_install "$work/of-wheel" "${wheel[0]}"
  check_in "$work/of-wheel"
  if [[ ! -d $work/tree ]]; then check_code "$work/of-wheel"; fi
  if [[ -n ${DEMO:-} ]]; then
    install_vllm "$work/of-wheel"
    has_nvidia_gpus || install_cpu_ops "$work/of-wheel" vllm
    (cd "$work" && "$work/of-wheel/bin/llm-allreduce" demo)
    DEMO=
  fi
  rm -rf "$work/of-wheel"
done
echo "== the sdist, on a machine without a CUDA toolkit"
held=$(tar tzf dist/*.tar.gz)
for name in csrc/CMakeLists.txt scripts/build_backend.py configs/tuning LICENSE; do
  grep -q "^[^/]*/$name" <<<"$held" || { echo "the sdist lacks $name" >&2; exit 1; }
done
if grep "/\.venv" <<<"$held"; then echo "the sdist has an environment in it" >&2; exit 1; fi
bare_environment "$work/of-sdist" "${pythons[0]}"
LLM_ALLREDUCE_CUDA_ARCHS=90 pip_install "$work/of-sdist" dist/*.tar.gz
check_in "$work/of-sdist"
