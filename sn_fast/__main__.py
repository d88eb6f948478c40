"""``python -m sn_fast`` is ``sn-fast``."""

from .cli import main

raise SystemExit(main())
