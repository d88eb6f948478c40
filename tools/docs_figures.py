"""Make the figures of docs/gallery.md anew, by running the page's own blocks.

python tools/docs_figures.py
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.docs.pages import programs_of  # noqa: E402


def main() -> None:
    os.environ.setdefault("MPLBACKEND", "agg")
    (ROOT / "docs" / "figures").mkdir(exist_ok=True)
    os.chdir(ROOT / "docs")
    for program in programs_of(ROOT / "docs" / "gallery.md"):
        program.run()
    for path in sorted(Path("figures").iterdir()):
        print(f"docs/{path}  {path.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main()
