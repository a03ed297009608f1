"""The optimizer of programs with offloaded states against torch's own."""

from __future__ import annotations

import torch
from torch import nn

from autopar.runtime.host_adamw import HostAdamW

SETTINGS = {"lr": 1e-2, "weight_decay": 0.1}


def trained(
    optimizer_class: type, dtype: torch.dtype, num_steps: int, scale: float = 1.0
) -> list[torch.Tensor]:
    """Parameters after steps with random gradients; the last one never has any."""
    generator = torch.Generator().manual_seed(0)
    parameters = [
        nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((4, 3), (5,), (2,))
    ]
    optimizer = optimizer_class(parameters, **SETTINGS)
    for _ in range(num_steps):
        for parameter in parameters[:2]:
            parameter.grad = (scale * torch.randn(parameter.shape, generator=generator)).to(dtype)
        optimizer.step()
        optimizer.zero_grad()
        assert all(parameter.grad is None for parameter in parameters)
    return [parameter.detach() for parameter in parameters]


def test_it_does_what_adamw_does() -> None:
    for dtype in (torch.float32, torch.float64):
        for found, wanted in zip(
            trained(HostAdamW, dtype, 5), trained(torch.optim.AdamW, dtype, 5), strict=True
        ):
            assert torch.equal(found, wanted)


def test_its_copies_keep_what_narrow_parameters_round_away() -> None:
    """Of 200 steps of 1e-4 a bfloat16 near 1, whose neighbours are 4e-3 apart, takes none by itself."""
    alone, hosted = (nn.Parameter(torch.ones(8, dtype=torch.bfloat16)) for _ in range(2))
    optimizers: tuple[torch.optim.AdamW | HostAdamW, ...] = (
        torch.optim.AdamW([alone], lr=1e-4, weight_decay=0.0),
        HostAdamW([hosted], lr=1e-4, weight_decay=0.0),
    )
    for parameter, optimizer in zip((alone, hosted), optimizers, strict=True):
        for _ in range(200):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
    assert torch.equal(alone.detach(), torch.ones(8, dtype=torch.bfloat16))
    torch.testing.assert_close(hosted.detach().float(), torch.full((8,), 0.98), atol=4e-3, rtol=0)


def test_it_reads_gradients_wider_than_their_parameters() -> None:
    """As they are: rounded to bfloat16, both would be 1."""
    hosted, wide = nn.Parameter(torch.ones(2, dtype=torch.bfloat16)), nn.Parameter(torch.ones(2))
    hosted.grad_dtype = torch.float32
    host = HostAdamW([hosted], lr=1e-2)
    optimizers: tuple[HostAdamW | torch.optim.AdamW, ...] = (host, torch.optim.AdamW([wide], lr=1e-2))
    for gradient in (torch.tensor([1.0, 1.001]), torch.tensor([-1.0, 0.001])):
        for parameter, optimizer in zip((hosted, wide), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    assert torch.equal(host.masters[hosted], wide)
