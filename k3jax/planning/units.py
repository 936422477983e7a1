# SPDX-License-Identifier: Apache-2.0
"""Numbers for people."""


def size_text(size: float) -> str:
    """Bytes, in powers of 1,000: "17.4 GB"."""
    for unit in ("B", "kB", "MB"):
        if abs(size) < 999.5:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
