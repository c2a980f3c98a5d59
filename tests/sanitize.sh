#!/usr/bin/env bash
# Build the kernels with AddressSanitizer and UndefinedBehaviorSanitizer (gcc, Linux) and run the kernel tests on them.
#
#   tests/sanitize.sh                      the operators, layers and their bad input
#   tests/sanitize.sh tests/test_ops_*.py  other pytest arguments
#
# Run it in the environment of the tests (CONTRIBUTING.md). The build goes to a temporary folder.
set -euo pipefail
cd "$(dirname "$0")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# in CC, since the build's probes link programs as well
flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g -O1"
echo "building into $work"
CC="${CC:-gcc} $flags" python setup.py -q build --build-base "$work/base" --build-lib "$work/lib" \
    >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }

# The runtimes must come first, before Python's own memory. Python and torch leak on purpose at exit. Kernels that are
# given corrupted arguments ask for more memory than there is, which must be an error of torch and not of the sanitizer.
runtimes=$(${CC:-gcc} -print-file-name=libasan.so):$(${CC:-gcc} -print-file-name=libubsan.so)
tests=("$@")
if [ ${#tests[@]} -eq 0 ]; then
    tests=(tests/test_{ops_*,linear,from_dense,layer_*,not_finite,weight_changes,process,conv2d,bad_input}.py
           tests/test_{quantization,fake_quant,epilogue,norm_statistics,blocks,packed,list_memory,pattern_held}.py
           tests/test_frozen_programs.py)
fi
cp -r tests pyproject.toml "$work/"
cd "$work"
LD_PRELOAD=$runtimes PYTHONPATH="$work/lib" QSPARSEPROP_SANITIZED=1 PYTHONMALLOC=malloc \
    ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:handle_segv=1:abort_on_error=1 \
    UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
    python -m pytest -q -p no:cacheprovider --hypothesis-profile=nightly "${tests[@]}"
