"""Metadata is in pyproject.toml; here, csrc/ becomes sn_fast._C where there is a CUDA toolkit (docs/building.md)."""

import os
import re
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

sys.path.insert(0, str(Path(__file__).resolve().parent / "build_tools"))  # an isolated build has not even this folder
import cuda_build

URL = "https://github.com/sn-fast/sn_fast"
NOTE = "_not_built.txt"  # tells the installed package why it has no kernels

try:
    PLAN = cuda_build.plan(os.environ)
except cuda_build.BuildError as error:
    sys.exit(f"sn_fast: {error}")


class BuildPython(build_py):
    """Runs once in every build, so that here is the place to say that there will be no kernels."""

    def run(self) -> None:
        super().run()
        if PLAN.toolkit:
            return
        if PLAN.required:
            raise CompileError(f"SN_FAST_CUDA=1, but {PLAN.why_not}")
        print(f"sn_fast: pure-Python install, no CUDA kernels: {PLAN.why_not}", flush=True)
        if not self.editable_mode:  # there the package is the source tree, which stays clean
            Path(self.build_lib, "sn_fast", NOTE).write_text(PLAN.why_not, encoding="utf-8")


class BuildKernels(build_ext):
    """Hands the one extension to ninja."""

    def build_extension(self, ext: Extension) -> None:
        version = self.distribution.get_version()
        try:
            cuda_build.build(PLAN.toolkit, Path(self.get_ext_fullpath(ext.name)).absolute(), version, os.environ)
        except cuda_build.BuildError as error:
            raise CompileError(str(error)) from error


def readme() -> str:
    """README.md with absolute links, which are right on a package index too."""
    text = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    text = re.sub(r"(!\[[^\]]*\]\()(?!https?:|#)", rf"\1{URL}/raw/main/", text)
    return re.sub(r"((?<!!)\[[^\]]*\]\()(?!https?:|#)", rf"\1{URL}/blob/main/", text)


setup(
    long_description=readme(),
    long_description_content_type="text/markdown",
    cmdclass={"build_py": BuildPython, "build_ext": BuildKernels},
    ext_modules=[Extension("sn_fast._C", ["csrc/bindings.cpp"])] if PLAN.toolkit else [],
)
