"""What a run found: figures, tables, and one HTML page that needs nothing but itself."""

from ftp_lightning.report.page import build_comparison, build_report
from ftp_lightning.report.wording import headline

__all__ = ["build_comparison", "build_report", "headline"]
