# Sourced by the other scripts: make_environment FOLDER ENGINE... leaves a virtual environment with torch, the engines and this
# package in it; environment_of ENGINE names its folder. Repeated calls only do what is missing or has changed. Settings:
#   PYTHON                    the interpreter to start from (3.11 to 3.13; default: the first of those found)
#   LLM_ALLREDUCE_CUDA_ARCHS  architectures to compile for; default here: that of the first GPU, 90 where there is none

VLLM_VERSION=0.32.0
SGLANG_VERSION=0.5.23
TORCH_VERSION=2.13.0        # what vLLM 0.32 is built for; on CPU ranks SGLang runs with it, too
SGLANG_TORCH_VERSION=2.14.1 # what SGLang 0.5.23 and its CUDA packages are built for

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  echo "no Python 3.11 to 3.13 found; name one with PYTHON=..." >&2
  return 1
}

has_nvidia_gpus() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; }

gpu_architecture() {
  local capability
  capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d '.')
  echo "${capability:-90}"
}

# run_step STAMP COMMAND...: runs once for each content of the stamp.
run_step() {
  local stamp=$1 key=$2
  shift 2
  [[ -f $stamp && $(<"$stamp") == "$key" ]] && return
  "$@"
  echo "$key" >"$stamp"
}

# environment_of ENGINE: its folder. On GPUs the engines want different releases of torch, so each has an environment.
environment_of() {
  if [[ $1 == sglang ]] && has_nvidia_gpus; then echo .venv-sglang; else echo .venv; fi
}

# engines_in FOLDER: the engines whose environment that is.
engines_in() {
  local engine
  for engine in vllm sglang; do
    if [[ $(environment_of "$engine") == "$1" ]]; then echo "$engine"; fi
  done
}

# torch_for ENGINE: torch comes first, because anything that asks for just "torch" would take the newest, with several GB
# of CUDA packages.
torch_for() {
  if [[ $1 == sglang ]] && has_nvidia_gpus; then echo "$SGLANG_TORCH_VERSION"; else echo "$TORCH_VERSION"; fi
}

# run_pip FOLDER ARGUMENT...: what pip says is shown when it fails.
run_pip() {
  local python=$1/bin/python output
  shift
  output=$("$python" -m pip --disable-pip-version-check --quiet "$@" 2>&1) || {
    printf '%s\n' "$output" >&2
    return 1
  }
}

pip_install() {
  local folder=$1
  shift
  run_pip "$folder" install "$@"
}

install_vllm() {
  echo "installing torch $(torch_for vllm) and vLLM $VLLM_VERSION in $1: a few minutes"
  pip_install "$1" "torch==$(torch_for vllm)"
  if has_nvidia_gpus; then
    pip_install "$1" "vllm==$VLLM_VERSION"
  else
    # Without a GPU: vLLM's Python code, its pure-Python needs, and plain-torch stand-ins for the missing CPU kernels.
    pip_install "$1" --no-deps -r scripts/vllm_cpu_ops/requirements.txt
    pip_install "$1" --no-deps "vllm==$VLLM_VERSION"
    remove_triton "$1"
  fi
}

install_sglang() {
  echo "installing torch $(torch_for sglang) and SGLang $SGLANG_VERSION in $1: a few minutes, less where vLLM is already"
  pip_install "$1" "torch==$(torch_for sglang)"
  if has_nvidia_gpus; then
    pip_install "$1" "sglang==$SGLANG_VERSION"
  else
    # Most of what SGLang's Python code needs is on vLLM's list. It asks for CUDA packages, too, hence --no-deps.
    pip_install "$1" --no-deps -r scripts/vllm_cpu_ops/requirements.txt
    pip_install "$1" --no-deps -r scripts/sglang_cpu_ops/requirements.txt
    pip_install "$1" --no-deps "sglang==$SGLANG_VERSION"
    remove_triton "$1"
  fi
}

# Where pip takes torch's CUDA build, Triton comes with it, and engines would launch kernels with it on the CPU.
remove_triton() { run_pip "$1" uninstall --yes triton; }

# install_build_needs FOLDER: what a build needs, in a place that stays. In pip's own, which is another each time, CMake
# would find every compiler changed and compile everything again; among the packages that run, a compiler has no place.
install_build_needs() {
  local needs=$1/build-needs wanted
  wanted=$("$1/bin/python" -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")')
  mapfile -t wanted <<<"$wanted"
  pip_install "$1" --upgrade --target "$needs" "${wanted[@]}" "cmake>=3.26" ninja
  wanted=$(PYTHONPATH=$needs:scripts "$1/bin/python" -c 'import build_backend; print(*build_backend.get_requires_for_build_wheel(), sep="\n")')
  mapfile -t wanted <<<"$wanted"
  if [[ -n ${wanted[0]} ]]; then pip_install "$1" --upgrade --target "$needs" "${wanted[@]}"; fi
}

install_package() {
  # Editable: Python changes count at once, C++ and CUDA changes when this step runs again.
  echo "building and installing llm_allreduce_plugin for sm_$LLM_ALLREDUCE_CUDA_ARCHS in $1: a minute or two for each architecture"
  local wanted
  # Once: headers that are written again would be newer than what was compiled from them.
  run_step "$1/.build-needs" "${LLM_ALLREDUCE_NVCC:-} $(digest_of pyproject.toml scripts/build_backend.py)" install_build_needs "$1"
  # What it needs to run comes by itself: pip takes what lies on PYTHONPATH for installed.
  wanted=$("$1/bin/python" -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")')
  mapfile -t wanted <<<"$wanted"
  pip_install "$1" "${wanted[@]}"
  PYTHONPATH=$1/build-needs pip_install "$1" --no-build-isolation --no-deps --editable .
}

# make_wheel FOLDER DESTINATION: a wheel of what install_package has compiled.
make_wheel() { PYTHONPATH=$1/build-needs run_pip "$1" wheel --no-build-isolation --no-deps --wheel-dir "$2" .; }

# install_cpu_ops FOLDER ENGINE: what stands in for the engine's missing CPU kernels or packages.
install_cpu_ops() { pip_install "$1" "./scripts/${2}_cpu_ops"; }

# install_extras FOLDER EXTRA...: what extras of this package ask for, without the package, whose build is a compile.
install_extras() {
  local folder=$1 wanted
  shift
  wanted=$("$folder/bin/python" -c '
import sys, tomllib
extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]
print(*dict.fromkeys(need for extra in sys.argv[1:] for need in extras[extra]), sep="\n")' "$@")
  mapfile -t wanted <<<"$wanted"
  pip_install "$folder" "${wanted[@]}"
}

# digest_of PATH...: of all files there but those that builds and Python leave.
digest_of() {
  find "$@" \( -name build -o -name dist -o -name __pycache__ -o -name '*.egg-info' \) -prune -o -type f -print0 |
    LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum | cut -d' ' -f1
}

# What a compile depends on.
source_digest() { digest_of pyproject.toml csrc scripts/build_backend.py; }

make_environment() {
  local folder=$1 python engine
  shift
  export LLM_ALLREDUCE_CUDA_ARCHS=${LLM_ALLREDUCE_CUDA_ARCHS:-$(gpu_architecture)}
  # Where nothing is run on a GPU, as on a machine without a CUDA toolkit: with nvcc from PyPI.
  if ! has_nvidia_gpus; then export LLM_ALLREDUCE_NVCC=${LLM_ALLREDUCE_NVCC:-wheels}; fi
  if [[ ! -x $folder/bin/python ]]; then
    python=$(find_python)
    echo "making a virtual environment in $folder with $python"
    "$python" -m venv "$folder"
  fi
  for engine in "$@"; do
    run_step "$folder/.$engine" "$(engine_stamp "$engine")" "install_$engine" "$folder"
  done
  run_step "$folder/.package" "$LLM_ALLREDUCE_CUDA_ARCHS $(source_digest)" install_package "$folder"
  if has_nvidia_gpus; then return; fi
  for engine in "$@"; do
    run_step "$folder/.${engine}_cpu_ops" "$(digest_of "scripts/${engine}_cpu_ops")" install_cpu_ops "$folder" "$engine"
  done
}

# engine_stamp ENGINE: what its installation depends on.
engine_stamp() {
  local release=$VLLM_VERSION
  if [[ $1 == sglang ]]; then release=$SGLANG_VERSION; fi
  echo "$(torch_for "$1") $release $(digest_of scripts/*_cpu_ops/requirements.txt)"
}

# install_tools FOLDER: what tests and lint need, into an environment that was made.
install_tools() { run_step "$1/.tools" "$(sha256sum <pyproject.toml)" install_extras "$1" test lint; }
