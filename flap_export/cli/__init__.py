"""The command line: it wraps the stages, prints what they found and turns errors into exit codes.

0 done      1 a gate was breached      2 wrong usage or input      3 something needed is missing      70 a defect here
"""

from __future__ import annotations

from flap_export.cli.app import main

__all__ = ["main"]
