"""Seeds and shuffles from names."""

from __future__ import annotations

import hashlib


def hashed(text: str) -> int:
    """A number below 2**63, which a generator takes as a seed, that looks random, and is the same in every
    process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) % 2**63
