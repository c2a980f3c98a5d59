"""The extension modules and the check of the compiler; all the rest of the packaging is in pyproject.toml.

Environment variables, read at build time:

``QSPARSEPROP_NO_OPENMP=1``  build single-threaded, with a compiler that has no OpenMP
``QSPARSEPROP_OPENMP=compiler``  link with the compiler's own OpenMP runtime in place of using torch's: a second one in
the process, for tools that know only that one (clang's ThreadSanitizer)
``QSPARSEPROP_WERROR=1``     warnings of Cython and, under -Wall -Wextra, of the C compiler are errors (CI)
``CC``, ``CFLAGS``, ``LDFLAGS``  as everywhere

No ``-march``/``-m`` flag appears here: each ``isa/*.c`` switches its own instruction set on by pragma (for Microsoft's
compiler by a flag of that file) and is chosen at import, so that one build runs on every CPU of the architecture.
"""

import os
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

KERNELS = Path("qsparseprop", "_kernels")
ISA = KERNELS / "isa"
OPENMP = KERNELS / "openmp"

CYTHON_DIRECTIVES = {
    "language_level": 3,
    "boundscheck": False,
    "wraparound": False,
    "cdivision": True,
    "initializedcheck": False,
    "embedsignature": True,
}

# -ffp-contract=off: otherwise gcc fuses a*b+c (intrinsics too) where the instruction set has FMA and nowhere else, and
# the instruction sets round, and so quantise, differently. Where a fused multiply-add is wanted the source says so.
# Microsoft's compiler is told by a pragma (kernels.h).
FLAGS = {
    "unix": ["-O2", "-std=gnu11", "-fno-math-errno", "-ffp-contract=off", "-fvisibility=hidden"],
    "msvc": ["/O2", "/std:c11", "/fp:precise"],
}
# The instruction sets' loops: with -O2 some kernels take up to twice the time, the portable ones three times. What
# Cython makes only deals out their tasks.
KERNEL_FLAGS = {"unix": ["-O3"], "msvc": []}
# Microsoft's compiler has no pragma for instruction sets: of a file, by how its name begins.
MSVC_ISA_FLAGS = {"avx2": "/arch:AVX2", "avx512": "/arch:AVX512", "avxvnni": "/arch:AVX2"}
# Cython's output is clean under these too (gcc 12, clang 14), so there are no exceptions for it.
STRICT = ["-Wall", "-Wextra", "-Werror"]
# Of the kernels also what may be a breach of strict aliasing: Python's own headers have much that looks like one.
STRICT_KERNELS = ["-Wstrict-aliasing=2"]

HELLO = "int main(void) { return 0; }\n"
PYTHON_H = "#include <Python.h>\nint main(void) { return 0; }\n"
USES_OPENMP = """\
#include <omp.h>
#ifndef _OPENMP
#error "the pragmas are ignored"
#endif
int main(void) {
    int i, sum = 0;
    #pragma omp parallel for reduction(+:sum)
    for (i = 0; i < 100; i++) sum += i;
    return omp_get_max_threads() >= 1 && sum == 4950 ? 0 : 1;
}
"""
# The value of the macro QSPARSEPROP_OPENMP: whose runtime is used.
NOBODYS, TORCHS, COMPILERS = range(3)


def enabled(variable):
    """Whether an environment variable is set to anything but 0."""
    return os.environ.get(variable, "0") not in ("", "0")


class Flags(NamedTuple):
    """What one way of using OpenMP adds to the two command lines, and whose runtime that is."""

    compile: list[str]
    link: list[str]
    runtime: int


NO_FLAGS = Flags([], [], NOBODYS)


def processors():
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def openmp_candidates(compiler_type):
    """The ways to try, in this order.

    Torch's runtime is in the process when the modules are loaded, so they are linked with none, which leaves its
    functions undefined (qsparseprop/_kernels/_runtime.py), and need no more than a compiler that knows the pragmas.
    """
    if compiler_type == "msvc":
        return [Flags(["/openmp"], [], COMPILERS)]
    # Apple's clang knows the pragmas behind its front door only.
    ways = [["-fopenmp"], *([["-Xpreprocessor", "-fopenmp"]] if sys.platform == "darwin" else [])]
    if sys.platform in ("linux", "darwin") and os.environ.get("QSPARSEPROP_OPENMP", "torch") == "torch":
        return [Flags([*way, f"-I{OPENMP.resolve()}"], [], TORCHS) for way in ways]
    candidates = [Flags(["-fopenmp"], ["-fopenmp"], COMPILERS)]
    if sys.platform == "darwin":
        # Homebrew installs its libomp where no compiler looks.
        for prefix in ("/opt/homebrew/opt/libomp", "/usr/local/opt/libomp"):
            if os.path.isdir(prefix):
                compile_flags = ["-Xpreprocessor", "-fopenmp", f"-I{prefix}/include"]
                candidates.append(Flags(compile_flags, [f"-L{prefix}/lib", "-lomp"], COMPILERS))
    return candidates


class BuildKernels(build_ext):
    """Asks the compiler first, so that what is missing is said in a sentence instead of a page of errors.

    All of it happens here and not at module level: `sdist`, `egg_info` and the like need neither compiler nor Cython.
    """

    def build_extensions(self):
        """Probe, then build, with a compiler for each processor, or as many as ``build_ext --parallel`` says."""
        kind = "msvc" if self.compiler.compiler_type == "msvc" else "unix"
        self.strict = kind == "unix" and enabled("QSPARSEPROP_WERROR")
        openmp = self.openmp_flags()
        compile_flags = [*FLAGS[kind], *(STRICT if self.strict else []), *openmp.compile]
        kernel_flags = [*KERNEL_FLAGS[kind], *(STRICT_KERNELS if self.strict else [])]

        # Timestamps alone would keep a module that was built with other flags.
        settings = repr([CYTHON_DIRECTIVES, compile_flags, kernel_flags, openmp])
        stamp = Path(self.build_temp, "settings.txt")
        self.force = self.force or not stamp.is_file() or stamp.read_text() != settings
        stamp.unlink(missing_ok=True)

        self.check_extensions_list(self.extensions)
        self.forget_the_interpreters_own_flags()
        macros = [("QSPARSEPROP_OPENMP", str(openmp.runtime))]
        # What clang's OpenMP lacks in torch's runtime, for modules with loops; of other compilers nothing.
        sources = sorted(path.as_posix() for path in OPENMP.glob("*.c"))
        objects = self.compiler.compile(sources, self.build_temp, macros, extra_postargs=compile_flags)
        for ext in self.extensions:
            ext.extra_compile_args = compile_flags
            ext.extra_link_args = openmp.link
            ext.extra_objects = objects if "prange" in Path(ext.sources[0]).read_text(encoding="utf-8") else []
            ext.define_macros = macros
        self.compile_in_parallel(kernel_flags)
        stamp.write_text(settings)

    def compile_in_parallel(self, kernel_flags):
        """Translate and build the modules, one object a job; after a failure, or Ctrl-C, nothing new is started."""
        compile_one, failures = self.compiler.compile, []

        def compile_source(source, *args, extra_postargs=(), **kwargs):
            if failures:
                raise failures[0]
            if Path(source).parent.name == ISA.name:
                extra_postargs = [*extra_postargs, *kernel_flags, *self.isa_flags(Path(source).stem)]
            try:
                return compile_one([source], *args, extra_postargs=extra_postargs, **kwargs)
            except BaseException as error:
                failures.append(error)
                raise

        def compile_all(sources, *args, **kwargs):
            jobs = [compilers.submit(compile_source, source, *args, **kwargs) for source in sources]
            return [path for job in jobs for path in job.result()]

        # the instruction sets first, which take longest
        extensions = sorted(self.extensions, key=lambda ext: -len(ext.sources))
        with ThreadPoolExecutor(self.parallel or processors()) as compilers:
            self.compiler.compile = compile_all
            with ThreadPoolExecutor(len(extensions)) as modules:  # these only wait for the compilers
                try:
                    building = []
                    for ext in extensions:
                        if failures:
                            raise failures[0]
                        ext.sources = [self.translated(ext, source) for source in ext.sources]
                        building.append(modules.submit(self.build_extension, ext))
                    for module in building:
                        module.result()
                except BaseException as error:
                    failures.append(error)
                    raise

    def isa_flags(self, isa):
        """What Microsoft's compiler is to be told of an instruction set."""
        if self.compiler.compiler_type != "msvc":
            return []
        return [flag for name, flag in MSVC_ISA_FLAGS.items() if isa.startswith(name)]

    def forget_the_interpreters_own_flags(self):
        """Take out of the commands that Python itself was built with what is wrong for modules that others get.

        Debug data would be eight tenths of them. The run path names this machine's folders; what the modules use of
        Python the interpreter has loaded, whatever its place. Both can be asked for, as by ``CFLAGS=-g``.
        """
        asked = " ".join(os.environ.get(name, "") for name in ("CC", "CFLAGS", "LDSHARED", "LDFLAGS")).split()
        for command, variable, prefixes in (
            ("compiler_so", "CFLAGS", ("-g",)),
            ("linker_so", "LDSHARED", ("-Wl,-rpath", "-Wl,-R")),
        ):
            flags = list(getattr(self.compiler, command, ()))
            for flag in (sysconfig.get_config_var(variable) or "").split():
                if flag.startswith(prefixes) and flag in flags and flag not in asked:
                    flags.remove(flag)
            if flags:
                self.compiler.set_executable(command, flags)

    def openmp_flags(self):
        """Flags with which the compiler builds a working OpenMP program; exits with one sentence where none does."""
        if not self.works(HELLO):
            command = getattr(self.compiler, "compiler_so", ["cl"])[0]
            raise SystemExit(
                f"error: qsparseprop needs a C compiler, and {command!r} is missing or does not work: install one "
                "(`apt install gcc`, `xcode-select --install`, or the Microsoft C++ Build Tools) or name another in CC."
            )
        if not self.works(PYTHON_H):
            raise SystemExit(
                f"error: qsparseprop needs the C headers of Python {sys.version_info.major}.{sys.version_info.minor}, "
                "and Python.h was not found: install them (`apt install python3-dev`, `dnf install python3-devel`)."
            )
        if os.environ.get("QSPARSEPROP_OPENMP", "torch") not in ("torch", "compiler"):
            raise SystemExit("error: QSPARSEPROP_OPENMP is 'torch' (whose OpenMP runtime is used) or 'compiler'.")
        if enabled("QSPARSEPROP_NO_OPENMP"):
            return NO_FLAGS
        for flags in openmp_candidates(self.compiler.compiler_type):
            if self.works(USES_OPENMP, flags):
                return flags
        raise SystemExit(
            "error: this C compiler cannot build an OpenMP program: name another in CC (gcc and clang know OpenMP, "
            "Apple's clang too), or set QSPARSEPROP_NO_OPENMP=1 to build qsparseprop single-threaded."
        )

    def works(self, program, flags=NO_FLAGS):
        """Whether the C program compiles, links, runs and returns 0; compiles, if its runtime will be torch's."""
        with tempfile.TemporaryDirectory() as folder:
            source = os.path.join(folder, "probe.c")
            Path(source).write_text(program)
            try:
                objects = self.compiler.compile([source], output_dir=folder, extra_postargs=flags.compile)
                if flags.runtime == TORCHS:
                    return True
                self.compiler.link_executable(objects, "probe", output_dir=folder, extra_postargs=flags.link)
                executable = os.path.join(folder, self.compiler.executable_filename("probe"))
                subprocess.run([executable], check=True, timeout=60)
            except (BaseError, CCompilerError, OSError, subprocess.SubprocessError):
                return False
        return True

    def translated(self, ext, source):
        """The C file of a .pyx file, made in the build directory: the source tree holds only what people wrote."""
        if not source.endswith(".pyx"):
            return source
        from Cython.Build import cythonize
        from Cython.Compiler import Options

        Options.warning_errors = self.strict
        # An Extension without `depends`: cythonize would copy those into the build directory as well.
        (c_extension,) = cythonize(
            [Extension(ext.name, [source])],
            build_dir=self.build_temp,
            compiler_directives=CYTHON_DIRECTIVES,
            force=self.force,
        )
        return c_extension.sources[0]


def extensions():
    """One module for each .pyx file; the instruction sets are compiled into `_dispatch`, which hands them out."""
    headers = sorted(path.as_posix() for path in KERNELS.rglob("*.h"))
    definitions = sorted(path.as_posix() for path in KERNELS.glob("*.pxd"))
    isa_sources = sorted(path.as_posix() for path in ISA.glob("*.c"))
    openmp_sources = sorted(path.as_posix() for path in OPENMP.glob("*.c"))
    return [
        Extension(
            f"qsparseprop._kernels.{pyx.stem}",
            [pyx.as_posix(), *(isa_sources if pyx.stem == "_dispatch" else [])],
            include_dirs=[KERNELS.as_posix()],
            depends=[*headers, *definitions, *openmp_sources],
        )
        for pyx in sorted(KERNELS.glob("*.pyx"))
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildKernels})
