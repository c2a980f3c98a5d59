"""Which instruction set the kernels use: found at import, overridable by ``QSPARSEPROP_ISA``."""

import os

cdef extern from "isa/cpu.h" nogil:
    const qsp_kernels *qsp_built[]
    enum:
        QSP_BUILT
    int qsp_supported(int)
    const qsp_kernels *qsp_table(int)

cdef extern from *:
    """
    #ifdef _OPENMP
    #define QSP_HAVE_OPENMP 1
    #else
    #define QSP_HAVE_OPENMP 0
    #endif
    #if defined(__clang__)
    #define QSP_COMPILER "Clang " __clang_version__
    #elif defined(__GNUC__)
    #define QSP_COMPILER "GCC " __VERSION__
    #else
    #define QSP_COMPILER "unknown"
    #endif
    """
    enum:
        QSP_HAVE_OPENMP
        QSPARSEPROP_OPENMP
    const char *QSP_COMPILER

cdef const qsp_kernels *_active = NULL

have_openmp = bool(QSP_HAVE_OPENMP)
#: Whose runtime the modules use; setup.py has these numbers.
openmp_of = ("nobody", "torch", "compiler")[QSPARSEPROP_OPENMP]
compiler = QSP_COMPILER.decode()
#: Lanes of a unit, slots of a group, and products of codes that an int32 sums up exactly.
unit, group, longest_row = QSP_UNIT, QSP_GROUP, QSP_MAX_EXACT


cdef const qsp_kernels *active_kernels() noexcept nogil:
    return _active


def built_isas():
    """Names of the instruction sets in this build, from the simplest to the widest."""
    return [qsp_built[i].name.decode() for i in range(QSP_BUILT)]


def supported_isas():
    """Names of those that this machine can run."""
    return [qsp_built[i].name.decode() for i in range(QSP_BUILT) if qsp_supported(i)]


def active_isa():
    """Name of the one in use."""
    return _active.name.decode()


def set_isa(str name):
    """Use the instruction set `name` from now on, in every thread; returns the name of the one before.

    Raises
    ------
    ValueError
        If it is not built, or this machine cannot run it.
    """
    global _active
    previous = None if _active is NULL else active_isa()
    cdef int i
    for i in range(QSP_BUILT):
        if qsp_built[i].name.decode() == name:
            if not qsp_supported(i):
                raise ValueError(
                    f"this processor cannot run the {name!r} kernels; it supports {', '.join(supported_isas())}"
                )
            _active = qsp_table(i)
            return previous
    raise ValueError(f"no kernels named {name!r} in this build; there are {', '.join(built_isas())}")


def _choose():
    wanted = os.environ.get("QSPARSEPROP_ISA", "").strip().lower()
    if not wanted:
        *_, widest = supported_isas()
        set_isa(widest)
        return
    try:
        set_isa(wanted)
    except ValueError as error:
        raise ImportError(f"QSPARSEPROP_ISA={wanted}: {error}") from None


_choose()
