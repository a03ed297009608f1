"""Where samples come from."""

from __future__ import annotations

import argparse
import math
import runpy
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

Inputs = Mapping[str, tuple[tuple[int, ...], torch.dtype, int]]
"""Of every model input the shape of one sample, the dtype, and the number of values of an integer one."""


Sample = dict[str, Tensor]


SOURCES = (
    "a file of tokens; a directory of datasets.save_to_disk; a dict of tensors, one row a sample "
    "(torch.save, .pt); or FILE.py:NAME, a function that returns samples by index or one after the other"
)


def open_data(options: argparse.Namespace, inputs: Inputs, tokens: str = "", labels: str = "") -> Any:
    """Samples, dicts of the model's inputs, by index or as an iterable: what `--data` names.

    `tokens` and `labels` are the inputs that a file of tokens fills.
    Raises ValueError where it is nothing of that kind.
    """
    given: str | None = options.data
    if given is None:
        return _Synthetic(inputs, options.seed)
    file, _, function = given.rpartition(":")
    if file.endswith(".py"):
        return runpy.run_path(file)[function]()
    path = Path(given)
    if path.is_dir():
        datasets = import_module("datasets")  # only those who have such a directory need the package
        return datasets.load_from_disk(given).with_format("torch", columns=list(inputs))
    if path.suffix == ".pt":
        return _Rows(torch.load(path, mmap=True, weights_only=True))
    if path.is_file() and not tokens:
        raise ValueError(f"--data {given}: no file of tokens can feed {', '.join(inputs)}")
    if path.is_file():
        return _TokenFile(path, getattr(torch, options.token_dtype), inputs, tokens, labels, options.shift)
    raise ValueError(f"--data {given}: no such file or directory; give {SOURCES}")


class _Synthetic(Dataset[Sample]):
    """Random samples, each by the seed of its number."""

    def __init__(self, inputs: Inputs, seed: int) -> None:
        self.inputs, self.seed = inputs, seed

    def __len__(self) -> int:
        return 2**40

    def __getitem__(self, index: int) -> Sample:
        generator = torch.Generator().manual_seed((self.seed * len(self) + index) % 2**63)
        return {
            name: torch.randn(shape, generator=generator, dtype=dtype)
            if dtype.is_floating_point
            else torch.randint(num_values, shape, generator=generator, dtype=dtype)
            for name, (shape, dtype, num_values) in self.inputs.items()
        }


class _Rows(Dataset[Sample]):
    """The rows of tensors."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, index: int) -> Sample:
        return {name: each[index] for name, each in self.tensors.items()}


class _TokenFile(Dataset[Sample]):
    """Pieces of a file of tokens as long as a sample; masks among the inputs let everything through, and
    there may be no others."""

    def __init__(
        self, path: Path, dtype: torch.dtype, inputs: Inputs, tokens: str, labels: str, shift: bool
    ) -> None:
        self.inputs, self.tokens, self.labels, self.shift = inputs, tokens, labels, int(shift)
        for name in inputs:
            if name not in (tokens, labels) and "mask" not in name:
                raise ValueError(
                    f"--data {path}: a file of tokens does not fill {name}; give a dict of tensors "
                    "or a function"
                )
        self.length = math.prod(inputs[tokens][0])
        size = path.stat().st_size // dtype.itemsize
        self.data = torch.from_file(str(path), shared=False, size=size, dtype=dtype)  # in memory as read
        if len(self) < 1:
            raise ValueError(f"{path} has {size:,} tokens of {dtype}, a sample takes {self.length:,}")

    def __len__(self) -> int:
        return (len(self.data) - self.shift) // self.length

    def __getitem__(self, index: int) -> Sample:
        def read(first: int, name: str) -> Tensor:
            shape, dtype, num_values = self.inputs[name]
            found = self.data[first : first + self.length].to(dtype).view(shape)
            if found.max() >= num_values:
                raise ValueError(
                    f"token {int(found.max())} in the data, but the model knows {num_values}; was it written "
                    "with another tokenizer, or is --token-dtype another one?"
                )
            return found

        first = index * self.length
        sample = {name: torch.ones(shape, dtype=dtype) for name, (shape, dtype, _) in self.inputs.items()}
        sample[self.tokens] = read(first, self.tokens)
        sample[self.labels] = read(first + self.shift, self.labels)
        return sample
