"""Builds the compiled modules for 64-bit ARM, and a wheel of them: ``build_arm64.py SYSTEM BUILD TO``, in the folder of
``setup.py``. The modules go to TO, the wheel, which nobody has audited yet, to BUILD.

With the sources and the flags of ``setup.py``, warnings being errors, by Debian's cross compiler and the headers of an
arm64 system that is unpacked in SYSTEM. The modules ask for no OpenMP runtime: they find the one of torch, see
``qsparseprop/_kernels/_runtime.py``.
"""

import runpy
import shutil
import subprocess
import sys
import tempfile
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
    make_wheel([TO / (name.rpartition(".")[2] + SUFFIX) for name in objects])


def make_wheel(modules):
    """The wheel that ``setup.py`` makes of everything else, with these modules."""
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        ignored = shutil.ignore_patterns(".git", "build", "dist", "*.so", "*.egg-info", "__pycache__", ".*_cache")
        shutil.copytree(".", work / "source", ignore=ignored)
        script = ("import runpy, setuptools; setup = setuptools.setup\n"
                  "setuptools.setup = lambda **keywords: setup()\n"
                  "runpy.run_path('setup.py')")  # fmt: skip
        subprocess.run([sys.executable, "-c", script, "-q", "bdist_wheel", "-d", str(work)], cwd=work / "source",
                       check=True, capture_output=True)  # fmt: skip
        wheel = [sys.executable, "-m", "wheel"]
        (pure,) = work.glob("*-none-any.whl")
        subprocess.run([*wheel, "unpack", str(pure), "-d", str(work)], check=True, stdout=subprocess.DEVNULL)
        (content,) = (path for path in work.glob("qsparseprop-*") if path.is_dir())
        for module in modules:
            shutil.copy(module, content / "qsparseprop" / "_kernels")
        (about,) = content.glob("*.dist-info/WHEEL")
        about.write_text(about.read_text().replace("Root-Is-Purelib: true", "Root-Is-Purelib: false"))
        subprocess.run([*wheel, "pack", str(content), "-d", str(work)], check=True, stdout=subprocess.DEVNULL)
        subprocess.run([*wheel, "tags", "--remove", "--python-tag", "cp311", "--abi-tag", "cp311", "--platform-tag",
                        "linux_aarch64", str(pure)], check=True, stdout=subprocess.DEVNULL)  # fmt: skip
        for old in BUILD.glob("*.whl"):
            old.unlink()
        shutil.move(next(work.glob("*.whl")), BUILD)


main()
