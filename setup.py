"""Metadata is in pyproject.toml. This version has no compiled part, so the build needs neither nvcc nor torch."""

from setuptools import setup

print("sn_fast: pure-Python build (plain PyTorch on every device; this version has no compiled kernels)", flush=True)
setup()
