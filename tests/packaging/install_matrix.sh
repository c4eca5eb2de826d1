#!/usr/bin/env bash
# `pip install .` with and without build isolation, with and without nvcc, each in a fresh environment, then import and one op.
# Slow (minutes), so it is not among the tests: `make test-install`.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${SYSTEM_PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# A clean copy: what git has or would add, so that no earlier build is found.
mkdir "$work/source"
git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$work/source"

check='
import importlib.util, pathlib, torch, mla_fp8
q_val, q_scale = torch.ops.mla_fp8.quantize_q_nope(torch.ones(3, 2, 128, dtype=torch.bfloat16))
assert q_val.shape == (2, 256, 128) and bool((q_scale[:, :3] == 1 / torch.tensor(448.0)).all()), (q_val.shape, q_scale)
directory = pathlib.Path(importlib.util.find_spec("mla_fp8._config").origin).parent
print("%.1f MB, %s images" % (directory.joinpath("libmla_fp8.so").stat().st_size / 1e6,
      "embedded" if b"\x50\xed\x55\xba" in directory.joinpath("libmla_fp8.so").read_bytes() else "no"), torch.__version__)
'

for isolation in isolated no-isolation; do
  for nvcc in AUTO OFF; do
    environment=$work/$isolation-$nvcc
    "$python" -m venv "$environment"
    "$environment/bin/python" -m pip install --quiet "${TORCH:?must be a requirement}"
    before=$("$environment/bin/python" -m pip freeze | grep '^torch==')
    options=(-Ccmake.define.MLA_FP8_NVCC=$nvcc)
    if [ $isolation = no-isolation ]; then
      "$environment/bin/python" -m pip install --quiet cmake ninja -r .venv/.tools.txt
      options+=(--no-build-isolation)
    fi
    start=$(date +%s%N)
    "$environment/bin/python" -m pip install --quiet "${options[@]}" "$work/source"
    milliseconds=$((($(date +%s%N) - start) / 1000000))
    test "$before" = "$("$environment/bin/python" -m pip freeze | grep '^torch==')"
    printf '%-13s nvcc %-4s %6d ms: ' $isolation $nvcc $milliseconds
    (cd "$work" && "$environment/bin/python" -W ignore -c "$check")
    rm -rf "$environment"
  done
done
