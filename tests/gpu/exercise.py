"""Runs every kernel once, small: the program that the sanitizer watches."""

from __future__ import annotations

import argparse
import re

import torch

from .cases import all_cases


def main() -> None:
    """On the GPU, or on the CPU for a rehearsal, there without kernels."""
    parser = argparse.ArgumentParser("tests.gpu.exercise")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default="", help="regular expression on the names of the cases")
    options = parser.parse_args()
    cases = [c for c in all_cases(options.device, small=True) if re.search(options.only, c.name)]
    for case in cases:
        case.run()
        if options.device == "cuda":
            torch.cuda.synchronize()
        print(f"ran: {case.name}", flush=True)
    print(f"ran {len(cases)} cases", flush=True)


if __name__ == "__main__":
    main()
