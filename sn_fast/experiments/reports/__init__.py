"""What ``sn-fast reproduce`` does: the runs that a part of the paper needs, its analyses, and the report of them."""

from .page import html_page
from .reproduce import PARTS, STORE, Report, reproduce

__all__ = ["PARTS", "STORE", "Report", "html_page", "reproduce"]
