"""What a rank of a pipeline runs at a time.

F  a forward
B  a whole backward
I  the part of a backward that the previous stage waits for, the gradient of the inputs
W  the rest of it, the gradient of the weights, which nobody waits for
O  a whole backward that runs together with the forward of another microbatch just before it
"""

from __future__ import annotations

from typing import Literal, get_args

Phase = Literal["F", "B", "I", "W", "O"]
PHASES: tuple[Phase, ...] = get_args(Phase)
Op = tuple[Phase, int, int]  # (phase, stage, microbatch)
