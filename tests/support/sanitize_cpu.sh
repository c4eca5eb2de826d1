#!/usr/bin/env bash
# AddressSanitizer and UBSan over the CPU tests: both libraries are built with them into build/sanitize, beside the normal build,
# once for each CPU instruction set. The first thing they find ends the process. Minutes, on any machine with GCC.
#   bash tests/support/sanitize_cpu.sh [AUTO|avx512|avx2|portable ...]
#   PYTEST_ARGS="--fuzz-cases=1000" bash tests/support/sanitize_cpu.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$(realpath -s "${PYTHON:-.venv/bin/python}")
packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
scripts=$(dirname "$python")
products=(tests/ops/test_{absorb_q,absorb_q_views,bmm,exact_cpu,quantize_q_nope,v_up,v_up_quantized}.py
  tests/ops/test_ops_{batch_invariance,fuzz,out}.py)
others=(tests/config/test_config{,_fuzz}.py tests/ops/test_ops_{extremes,rejects,rejects_out}.py
  tests/weights/test_weights{,_fuzz}.py)  # the same for every instruction set

mkdir -p build/sanitize
for cpu in ${*:-AUTO avx512 avx2 portable}; do
  build=$PWD/build/sanitize/$cpu
  PATH=$scripts:$PATH cmake -S . -B "$build" -G Ninja -DMLA_FP8_CPU="$cpu" -DMLA_FP8_NVCC=OFF -DPython_EXECUTABLE="$python" \
    -DMLA_FP8_SANITIZE=address,undefined,float-cast-overflow -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" >"$build.log"
  PATH=$scripts:$PATH cmake --build "$build" >>"$build.log"
  cmake --install "$build" --prefix "$build/site" >>"$build.log"
  cp -r mla_fp8/. "$build/site/mla_fp8/"
  # -S: without .pth files, so that the editable install does not put the normal build before this one.
  # Leaks are not looked for: the interpreter and torch keep what they allocate until the process ends.
  export PYTHONPATH=$build/site:$packages
  # An allocation that is too large fails, as without ASan: test_ops_extremes.py asks for some.
  export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1
  preload="$(g++ -print-file-name=libasan.so):$(g++ -print-file-name=libubsan.so):$(g++ -print-file-name=libstdc++.so)"
  cd "$build"  # away from the sources' own mla_fp8
  LD_PRELOAD=$preload "$python" -S - "$build" "$cpu" <<'PYTHON'
import sys
from mla_fp8 import _native
assert str(_native.LIBRARY).startswith(sys.argv[1]), f"the sanitized library must be loaded, got {_native.LIBRARY}"
assert b"__asan_report_load" in _native.LIBRARY.read_bytes() and b"__ubsan_handle" in _native.LIBRARY.read_bytes()
print(f"sanitize: {sys.argv[2]}, {_native.cpu_instruction_set()} kernels", flush=True)
PYTHON
  cd - >/dev/null
  tests=("${products[@]}")
  if [ "$cpu" = AUTO ]; then tests+=("${others[@]}"); fi
  CXXFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all" \
    LD_PRELOAD=$preload "$python" -S "$scripts/pytest" -q -p no:cacheprovider --capture=sys \
    -o pythonpath="tests/support tests/integrations tests/weights" "${tests[@]}" ${PYTEST_ARGS:-}  # without "."
done
