"""How scripts end that ranks run (`rank_pool`): code 0 where all is as it should be."""

from __future__ import annotations

import sys

import torch.distributed as dist


def end(wrong: str | None) -> None:
    """Leave the process group; where something is `wrong`, print it and exit with 1."""
    dist.destroy_process_group()
    if wrong is not None:
        print(wrong)
        sys.exit(1)
