"""Everything that only a GPU can tell, in one command: ``python -m benchmarks.gpu_check`` (docs/benchmarks.md).

The parent process (``runner``) knows no torch: it runs each stage in a process of its own, under a time limit, and
writes the results after each. A stage that crashes the GPU's context, or is killed, costs the others nothing, and what
it had recorded is kept.
"""
