#!/usr/bin/env bash
# compute-sanitizer over the GPU tests that reach every tile, stream and graph. At the end a line a tool; status 1 if one
# found anything, if a test failed or if none ran. Needs an H100 and compute-sanitizer, which the CUDA toolkit holds.
#   bash tests/support/sanitize.sh [memcheck|racecheck|initcheck|synccheck ...]
# All four are minutes; where a session on a GPU is short, give one at a time. The last column is the seconds each took.
#   memcheck   every access to memory: bounds, alignment, the driver's errors; each tensor its own allocation (below)
#   racecheck  every access to shared memory by our kernels, and hazards between threads: slowest, most host memory
#   initcheck  every read of global memory that nobody wrote before
#   synccheck  barriers only: the quickest
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 2
python=${PYTHON:-python3}
# What racecheck is told to look at: PyTorch's own kernels need no check, and are most of its time.
ours=(--kernel-name kns=absorb_q --kernel-name kns=v_up --kernel-name kns=bmm_k --kernel-name kns=quantize_q_nope)
tests=(tests/gpu/test_tiles_cuda.py "tests/gpu/test_product_streams_cuda.py::test_products_cuda_dependent_chain_of_own_kernels")
known=(memcheck racecheck initcheck synccheck)

tools=("$@")
if [ ${#tools[@]} -eq 0 ]; then tools=("${known[@]}"); fi
for tool in "${tools[@]}"; do
  if [[ " ${known[*]} " != *" $tool "* ]]; then
    echo "sanitize.sh: a tool must be one of ${known[*]}, got $tool" >&2
    exit 2
  fi
done
if ! command -v compute-sanitizer >/dev/null; then
  echo "sanitize.sh: compute-sanitizer must be on the PATH, got none: it comes with the CUDA toolkit" >&2
  exit 2
fi

mkdir -p build/sanitize
failed=0
lines=()
for tool in "${tools[@]}"; do
  log=build/sanitize/$tool.log
  begin=$SECONDS
  status=0
  only=()
  if [ "$tool" = racecheck ]; then only=("${ours[@]}"); fi
  # PyTorch's allocator hides frees inside its blocks from memcheck; without it every tensor is an allocation of its own.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" "${only[@]}" --error-exitcode 9 \
    "$python" -m pytest -m gpu -q -p no:cacheprovider "${tests[@]}" -k "not refuses" 2>&1 | tee "$log" || status=$?
  found=$(grep -E '(ERROR|RACECHECK) SUMMARY: ' "$log" | sed 's/.*SUMMARY: //; s/ displayed//')
  passed=$(grep -oE '[1-9][0-9]* passed' "$log" | tail -1)
  verdict=ok
  if [ "$status" -ne 0 ] || [ -z "$found" ] || [ -z "$passed" ] || grep -qvE '^0 (errors|hazards)' <<<"$found"; then
    verdict=FAILED
    failed=1
  fi
  found=$(grep -vE '^0 (errors|hazards)' <<<"$found" || echo "$found")  # of several processes, what one found
  lines+=("$(printf '%-9s  %-6s  %s, %s, status %s, %s s' "$tool" "$verdict" "$(tail -1 <<<"${found:-no summary}")" \
    "${passed:-0 passed}" "$status" "$((SECONDS - begin))")")
done
printf '\n'
printf '%s\n' "${lines[@]}"
exit $failed
