#!/usr/bin/env bash
# The Python code of SGLang's wheels, to test against versions beside the installed one: scripts/unpack_sglang.sh FOLDER VERSION...
# Then ALLREDUCE_TEST_SGLANG=FOLDER/VERSION:... pytest tests/engines/test_sglang.py
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
  "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --dest "$folder" "sglang==$version"
  "$python" - "$folder" "$version" <<'PYTHON'
import shutil
import sys
import zipfile
from pathlib import Path

folder, version = Path(sys.argv[1]), sys.argv[2]
(wheel,) = folder.glob(f"sglang-{version}-*.whl")
shutil.rmtree(folder / version, ignore_errors=True)
with zipfile.ZipFile(wheel) as archive:
    archive.extractall(folder / version, [name for name in archive.namelist() if not name.endswith(".so")])
wheel.unlink()
PYTHON
  echo "$folder/$version"
done
