#!/usr/bin/env bash
# The Python code of an engine's wheels, to test against versions beside the installed one:
#   scripts/unpack_engine.sh vllm|sglang FOLDER VERSION...
# Then ALLREDUCE_TEST_VLLM=FOLDER/VERSION:... pytest tests/engines/test_vllm_fusion.py
# or ALLREDUCE_TEST_SGLANG=FOLDER/VERSION:... pytest tests/engines/test_sglang.py
set -euo pipefail
if (($# < 3)) || [[ $1 != vllm && $1 != sglang ]]; then
  echo "usage: $0 vllm|sglang FOLDER VERSION..." >&2
  exit 2
fi
engine=$1
folder=$2
shift 2
python=${PYTHON:-python}
platform=() # that of this machine; vLLM's wheels are for a newer one than some
if [[ $engine == vllm ]]; then platform=(--platform manylinux_2_28_x86_64); fi
mkdir -p "$folder"
for version in "$@"; do
  "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
    "${platform[@]}" --dest "$folder" "$engine==$version"
  "$python" - "$engine" "$folder" "$version" <<'PYTHON'
import shutil
import sys
import zipfile
from pathlib import Path

engine, folder, version = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
(wheel,) = folder.glob(f"{engine}-{version}-*.whl")
shutil.rmtree(folder / version, ignore_errors=True)
with zipfile.ZipFile(wheel) as archive:
    archive.extractall(folder / version, [name for name in archive.namelist() if not name.endswith(".so")])
wheel.unlink()
PYTHON
  echo "$folder/$version"
done
