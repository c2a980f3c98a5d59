#!/usr/bin/env bash
# Run the kernels where their faults are seen (gcc, Linux), and see that faults are: each part begins with some that are made
# on purpose. Run it in the environment of the tests (CONTRIBUTING.md). Everything is built in a temporary folder.
#
#   tests/sanitize.sh                              AddressSanitizer and UndefinedBehaviorSanitizer: operators, layers,
#                                                  frozen programs, bad input; a third of the generated examples
#   tests/sanitize.sh address tests/test_ops_*.py  the same with other arguments for pytest
#   tests/sanitize.sh thread [ISA...]              ThreadSanitizer: every parallel region, entered by three threads
#   tests/sanitize.sh valgrind                     memcheck: primitives and products in C, on the instruction sets it knows
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
gcc=${CC:-gcc}
SECONDS=0
step() { printf '\n== %s (%d s)\n' "$*" "$SECONDS"; }
fail() { echo "error: $*" >&2; exit 1; }

# The modules with these flags. They are in the command of the compiler, since the build's probes link programs as well.
# Of optimisations the last one counts, and -O3 takes an instrumented instruction set four minutes.
build() {
    step "build"
    printf '#!/usr/bin/env bash\nexec %s "$@" -fno-omit-frame-pointer -g -O1 %s\n' "$gcc" "$*" >"$work/cc"
    chmod +x "$work/cc"
    CC="$work/cc" python setup.py -q build --build-base "$work/base" --build-lib "$work/lib" \
        >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
    cp -r tests pyproject.toml "$work/"
}

# A command that has to fail with a report of the fault that it makes.
reported() {
    local report=$1
    shift
    if "$@" >"$work/report" 2>&1; then fail "nobody has reported: $*"; fi
    grep -q "$report" "$work/report" || { cat "$work/report"; fail "no report of: $*"; }
    echo "reported: ${*: -1}"
}

address() {
    # Checks as calls, and none of a pointer's null and object, which halve the time of the compiler.
    local flags="-fsanitize=address,undefined -fno-sanitize=null,object-size -fno-sanitize-recover=undefined"
    flags+=" --param asan-instrumentation-with-call-threshold=0"
    build "$flags"
    # The runtimes must come first, before Python's own memory. Python and torch leak on purpose at exit. Kernels that are
    # given corrupted arguments ask for more memory than there is, which must be an error of torch and not of the sanitizer.
    export LD_PRELOAD PYTHONPATH="$work/lib" QSPARSEPROP_SANITIZED=1 PYTHONMALLOC=malloc
    export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:handle_segv=1:abort_on_error=1
    export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
    LD_PRELOAD=$($gcc -print-file-name=libasan.so):$($gcc -print-file-name=libubsan.so)
    cd "$work"
    step "faults"
    reported AddressSanitizer python tests/_faults.py memory
    step "tests"
    python -m pytest -q -n auto -p no:cacheprovider --timeout=1800 --durations=10 "$@"
}

# gcc's runtime knows no OpenMP; LLVM's says to it what waits for what (archer). Loaded first, it is torch's runtime, too.
thread() {
    local archer llvm
    archer=$(find "${LLVM_LIBRARIES:-/usr/lib}" -name libarcher.so 2>/dev/null | sort | tail -1)
    llvm=$(dirname "$archer")
    if [ ! -f "$archer" ] || [ ! -f "$llvm/libomp.so.5" ]; then
        fail "needs LLVM's libomp.so.5 and libarcher.so (apt install libomp-dev), or their folder in LLVM_LIBRARIES"
    fi
    build -fsanitize=thread
    "$gcc" -shared -fPIC -O1 tests/native/regions.c -o "$work/regions.so" -ldl
    "$gcc" -fsanitize=thread -g -O1 -fopenmp tests/native/racy.c -o "$work/racy"
    export PYTHONPATH="$work/lib" PYTHONMALLOC=malloc OMP_NUM_THREADS=3 OMP_TOOL_LIBRARIES="$archer"
    export TSAN_OPTIONS="ignore_noninstrumented_modules=1 history_size=4 exitcode=66"
    local preload
    preload="$($gcc -print-file-name=libtsan.so) $work/regions.so $llvm/libomp.so.5"
    cd "$work"
    step "races"
    LD_PRELOAD=$preload ./racy none >/dev/null
    reported "data race" env LD_PRELOAD="$preload" ./racy race
    reported "data race" env LD_PRELOAD="$preload" TSAN_OPTIONS="$TSAN_OPTIONS halt_on_error=1" \
        python tests/_faults.py race
    step "every parallel region"
    LD_PRELOAD=$preload python tests/_regions.py "$@" >"$work/report" 2>&1 || { cat "$work/report"; exit 1; }
    tail -1 "$work/report"
}

memcheck() {
    command -v valgrind >/dev/null || fail "needs valgrind"
    step "build"
    local source check=(valgrind -q --error-exitcode=9)
    for source in tests/native/primitives.c qsparseprop/_kernels/isa/*.c; do
        "$gcc" -O1 -g -std=gnu11 -fno-math-errno -ffp-contract=off -Itests/native -Iqsparseprop/_kernels -c "$source" \
            -o "$work/$(basename "$source" .c).o"
    done
    "$gcc" "$work"/*.o -lm -o "$work/primitives"
    step "faults"
    for fault in read write freed uninitialised; do reported "==" "${check[@]}" "$work/primitives" 1 "$fault"; done
    step "primitives and products"
    "${check[@]}" "$work/primitives" 20
}

case ${1:-address} in
thread) shift; thread "$@" ;;
valgrind) memcheck ;;
address | tests/* | -*)
    if [ "${1:-}" = address ]; then shift; fi
    tests=("$@")
    if [ ${#tests[@]} -eq 0 ]; then
        tests=(tests/test_{ops_*,linear,from_dense,layer_*,not_finite,weight_changes,process,conv2d,bad_input}.py
               tests/test_{quantization,fake_quant,epilogue,norm_statistics,blocks,packed,list_memory,pattern_held}.py
               tests/test_{frozen_programs,mask_ops,transpose}.py)
    fi
    address "${tests[@]}"
    ;;
*) fail "no such part: $1" ;;
esac
step "clean"
