"""Runs one stage in this process: ``python -m benchmarks.gpu_check.child STAGE --out FILE --seconds N``."""

from __future__ import annotations

import argparse
import importlib
import json
import signal
import sys
import time
from pathlib import Path

from .context import Context


def probe() -> dict[str, object]:
    """The GPU and the software, without sn_fast."""
    import platform

    import torch

    found: dict[str, object] = {"python": platform.python_version(), "torch": torch.__version__}
    found["cuda"] = torch.version.cuda
    found["gpu"] = torch.cuda.is_available()
    if found["gpu"]:
        properties = torch.cuda.get_device_properties(0)
        found["name"] = properties.name
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["multiprocessors"] = properties.multi_processor_count
        found["l2_bytes"] = properties.L2_cache_size
        found["memory_bytes"] = properties.total_memory
        found["cudnn"] = torch.backends.cudnn.version()
    return found


def main() -> int:
    """Exit code 0: the stage ran to its end, whatever it found."""
    parser = argparse.ArgumentParser("gpu_check.child")
    parser.add_argument("stage")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--previous", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    # As an exception, so that what the stage has started is stopped with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    if options.stage == "probe":
        options.out.write_text(json.dumps(probe()))
        return 0
    previous = json.loads(options.previous.read_text()) if options.previous else {}
    ends = time.monotonic() + options.seconds
    context = Context(options.out, previous, ends, rehearse=options.rehearse, quick=options.quick)
    context.save()
    importlib.import_module(f"benchmarks.gpu_check.stages.{options.stage}").run(context)
    context.save()
    return 0


if __name__ == "__main__":
    sys.exit(main())
