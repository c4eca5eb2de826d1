#!/usr/bin/env bash
# compute-sanitizer over the GPU tests that reach every tile, stream and graph: memcheck, racecheck, synccheck. Minutes, on a GPU.
#   bash tests/sanitize.sh [tools]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
tests=(tests/test_tiles_cuda.py "tests/test_gemm_streams_cuda.py::test_gemm_cuda_dependent_chain_of_own_kernels")
for tool in ${*:-memcheck racecheck synccheck}; do
  echo "$tool"
  # PyTorch's allocator hides frees inside its blocks from memcheck; without it every tensor is an allocation of its own.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
    "$python" -m pytest -m gpu -q -p no:cacheprovider "${tests[@]}" -k "not refuses"
done
