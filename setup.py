"""Builds the C++ extension pcoherence._C; everything else is declared in pyproject.toml.

PCOHERENCE_NO_EXTENSION=1 installs the Python files alone: the reference needs no compiler.
"""

import os
from pathlib import Path

from setuptools import setup


def extension_modules():
    """The extension, or nothing when it is switched off; only building it needs torch."""
    if os.environ.get("PCOHERENCE_NO_EXTENSION") == "1":
        return [], {}
    import pybind11
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    sources = ["csrc/tables.cpp", *sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))]
    flags = [
        "-std=c++20",
        "-O3",
        "-g0",  # debug information would make the binary twenty times larger
        "-fvisibility=hidden",
        "-ffp-contract=fast",  # fused multiply-add where the instruction set has it
        "-fno-math-errno",
        "-fno-trapping-math",
        "-Wall",
        "-Werror=switch",  # a new metric, objective or method must be treated everywhere
        "-Wno-psabi",  # vectors wider than the baseline's registers are only passed within one file
        "-Wno-unknown-pragmas",
    ]
    extension = CppExtension(
        "pcoherence._C",
        sources,
        include_dirs=[pybind11.get_include()],
        # The oldest torch whose stable ABI is used: 2.11.
        define_macros=[("TORCH_TARGET_VERSION", "0x020b000000000000")],
        extra_compile_args={"cxx": flags},
        depends=sorted(str(path) for path in Path("csrc").rglob("*.[hi]*")),
    )
    return [extension], {"build_ext": BuildExtension.with_options(use_ninja=True)}


ext_modules, cmdclass = extension_modules()
setup(ext_modules=ext_modules, cmdclass=cmdclass)
