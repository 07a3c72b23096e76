#!/usr/bin/env bash
# The Python code of vLLM's wheels, to test against versions beside the installed one: scripts/unpack_vllm.sh FOLDER VERSION...
# Then ALLREDUCE_TEST_VLLM=FOLDER/VERSION:... pytest tests/engines/test_vllm_fusion.py
set -euo pipefail
if (($# < 2)); then
  echo "usage: $0 FOLDER VERSION..." >&2
  exit 2
fi
folder=$1
shift
python=${PYTHON:-python}
mkdir -p "$folder"
for version in "$@"; do
  "$python" -m pip download --quiet --no-deps --only-binary :all: --platform manylinux_2_28_x86_64 --dest "$folder" "vllm==$version"
  "$python" - "$folder" "$version" <<'PYTHON'
import sys
import zipfile
from pathlib import Path

folder, version = Path(sys.argv[1]), sys.argv[2]
(wheel,) = folder.glob(f"vllm-{version}-*.whl")
with zipfile.ZipFile(wheel) as archive:
    archive.extractall(folder / version, [name for name in archive.namelist() if not name.endswith(".so")])
wheel.unlink()
PYTHON
  echo "$folder/$version"
done
