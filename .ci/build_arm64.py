"""Builds the compiled modules for 64-bit ARM: ``build_arm64.py SYSTEM BUILD TO``, in the folder of ``setup.py``.

With the sources and the flags of ``setup.py``, warnings being errors, by Debian's cross compiler and the headers of an
arm64 system that is unpacked in SYSTEM. The modules ask for no OpenMP runtime: they find the one of torch, see
``qsparseprop/_kernels/_runtime.py``.
"""

import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import setuptools
from Cython.Build import cythonize

COMPILER = "aarch64-linux-gnu-gcc"
SUFFIX = ".cpython-311-aarch64-linux-gnu.so"
SYSTEM, BUILD, TO = (Path(argument).resolve() for argument in sys.argv[1:4])


def newest(paths):
    """When the last of some files was changed."""
    return max((path.stat().st_mtime for path in paths), default=0.0)


def main():
    """Translate, compile and link, an object or a module a job; what is newer than its sources stays."""
    setuptools.setup = lambda **_: None
    setup = runpy.run_path("setup.py")
    extensions = setup["extensions"]()
    headers = newest(Path(name) for name in extensions[0].depends)
    flags = [*setup["FLAGS"]["unix"], *setup["STRICT"], "-fopenmp", "-fPIC", "-fwrapv", "-DNDEBUG",
             "-DQSPARSEPROP_OPENMP=1", f"-I{setup['KERNELS']}", f"-I{setup['OPENMP']}",
             f"-I{SYSTEM}/usr/include/python3.11", "-idirafter", f"{SYSTEM}/usr/include"]  # fmt: skip
    kernels = [*setup["KERNEL_FLAGS"]["unix"], *setup["STRICT_KERNELS"]]

    def compiled(source):
        to = BUILD / Path(source).with_suffix(".o").name
        to.parent.mkdir(parents=True, exist_ok=True)
        if not to.is_file() or to.stat().st_mtime < max(headers, newest([Path(source)])):
            own = kernels if Path(source).parent.name == "isa" else []
            subprocess.run([COMPILER, *flags, *own, "-c", source, "-o", str(to)], check=True)
        return str(to)

    translated = {}
    for extension in extensions:
        (made,) = cythonize([setuptools.Extension(extension.name, extension.sources[:1])], build_dir=str(BUILD),
                            compiler_directives=setup["CYTHON_DIRECTIVES"], quiet=True)  # fmt: skip
        translated[extension.name] = [*extension.sources[1:], *made.sources]
    with ThreadPoolExecutor(setup["processors"]()) as jobs:
        objects = {name: [jobs.submit(compiled, source) for source in sources] for name, sources in translated.items()}
        for name, made in objects.items():
            to = TO / (name.rpartition(".")[2] + SUFFIX)
            subprocess.run([COMPILER, "-shared", *(job.result() for job in made), "-o", str(to)], check=True)


main()
