#!/usr/bin/env bash
# Set-up and all tests: lint, format, types, the CUDA compile, unit, CPU, engine and (where there are GPUs) GPU tests.
# Makes its own virtual environment on a fresh machine. Arguments go to pytest: scripts/test.sh tests/unit -k policy
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

make_environment .venv
python=.venv/bin/python
run_step .venv/.tools "$(sha256sum <pyproject.toml)" \
  "$python" -m pip install --quiet --disable-pip-version-check --upgrade ".[test,lint]"
source_files=(llm_allreduce_plugin tests scripts benchmarks)

echo "== ruff, clang-format, mypy, shellcheck-by-bash"
"$python" -m ruff check "${source_files[@]}"
"$python" -m ruff format --check "${source_files[@]}"
git ls-files 'csrc/*.cu' 'csrc/*.cuh' 'csrc/*.cpp' 'csrc/*.h' | xargs .venv/bin/clang-format --dry-run --Werror
"$python" -m mypy
for script in scripts/*.sh .ci/run; do bash -n "$script"; done

echo "== tests"
# The installed package is tested, not the source tree: -P keeps the current folder off the path, tests are found by rootdir.
"$python" -m pytest "$@"
