# Sourced by the other scripts: make_environment FOLDER leaves a virtual environment with torch, vLLM and this package in it.
# Repeated calls only do what is missing or has changed. Settings:
#   PYTHON                    the interpreter to start from (3.11 to 3.13; default: the first of those found)
#   LLM_ALLREDUCE_CUDA_ARCHS  architectures to compile for; default here: that of the first GPU, 90 where there is none

VLLM_VERSION=0.32.0
TORCH_VERSION=2.13.0 # what vLLM 0.32 is built for

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

install_engine() {
  local pip=("$1/bin/python" -m pip install --quiet --disable-pip-version-check)
  # torch first: anything that asks for just "torch" would take the newest, with several GB of CUDA packages.
  "${pip[@]}" "torch==$TORCH_VERSION"
  if has_nvidia_gpus; then
    "${pip[@]}" "vllm==$VLLM_VERSION"
  else
    # Without a GPU: vLLM's Python code, its pure-Python needs, and plain-torch stand-ins for the missing CPU kernels.
    "${pip[@]}" --no-deps -r scripts/vllm_cpu_ops/requirements.txt
    "${pip[@]}" --no-deps "vllm==$VLLM_VERSION"
    # Where pip takes torch's CUDA build, Triton comes with it, and vLLM would launch kernels with it on the CPU.
    "$1/bin/python" -m pip uninstall --quiet --yes triton
  fi
}

install_package() {
  # Editable: Python changes count at once, C++ and CUDA changes when this step runs again.
  "$1/bin/python" -m pip install --quiet --disable-pip-version-check --editable .
}

install_cpu_ops() {
  "$1/bin/python" -m pip install --quiet --disable-pip-version-check ./scripts/vllm_cpu_ops
}

# install_extras FOLDER EXTRA...: what extras of this package ask for, without the package, whose build is a compile.
install_extras() {
  local python=$1/bin/python wanted
  shift
  wanted=$("$python" -c '
import sys, tomllib
extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]
print(*dict.fromkeys(need for extra in sys.argv[1:] for need in extras[extra]), sep="\n")' "$@")
  xargs -d '\n' "$python" -m pip install --quiet --disable-pip-version-check <<<"$wanted"
}

# digest_of PATH...: of all files there but those that builds and Python leave.
digest_of() {
  find "$@" \( -name build -o -name dist -o -name __pycache__ -o -name '*.egg-info' \) -prune -o -type f -print0 |
    LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum | cut -d' ' -f1
}

# What a compile depends on.
source_digest() { digest_of pyproject.toml csrc scripts/build_backend.py; }

make_environment() {
  local folder=$1 python
  export LLM_ALLREDUCE_CUDA_ARCHS=${LLM_ALLREDUCE_CUDA_ARCHS:-$(gpu_architecture)}
  if [[ ! -x $folder/bin/python ]]; then
    python=$(find_python)
    echo "making a virtual environment in $folder with $python"
    "$python" -m venv "$folder"
  fi
  echo "installing torch $TORCH_VERSION and vLLM $VLLM_VERSION (a few minutes the first time)"
  run_step "$folder/.engine" "$TORCH_VERSION $VLLM_VERSION $(sha256sum <scripts/vllm_cpu_ops/requirements.txt)" install_engine "$folder"
  echo "building and installing llm_allreduce_plugin for sm_$LLM_ALLREDUCE_CUDA_ARCHS"
  run_step "$folder/.package" "$LLM_ALLREDUCE_CUDA_ARCHS $(source_digest)" install_package "$folder"
  has_nvidia_gpus || run_step "$folder/.cpu_ops" "$(digest_of scripts/vllm_cpu_ops)" install_cpu_ops "$folder"
}

# install_tools FOLDER: what tests and lint need, into an environment that was made.
install_tools() { run_step "$1/.tools" "$(sha256sum <pyproject.toml)" install_extras "$1" test lint; }
