"""What a rank holds of a tensor, as torch.distributed.checkpoint takes it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from autopar.runtime.layout import Layout


class Held(torch.Tensor):
    """A tensor of the original model as `torch.distributed.checkpoint` takes it: the rectangles of it that
    this rank holds in `local`, by a protocol that DTensor follows too. It is written and read under any
    layout."""

    rectangles: Layout
    local: Tensor

    @staticmethod
    def __new__(cls, rectangles: Layout, local: Tensor) -> Held:
        made: Held = torch.Tensor._make_wrapper_subclass(
            cls, torch.Size(rectangles.shape), dtype=local.dtype, device=local.device
        )
        made.rectangles, made.local = rectangles, local
        return made

    @classmethod
    def __torch_dispatch__(cls, op: Any, *_: Any) -> Any:
        # No part left to write: it has no elements to compute with, and checkpoints ask for none.
        raise NotImplementedError(
            f"{op}: what a rank holds of a tensor is saved and loaded, and nothing else"
        )

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(torch.Size(first for first, _ in rectangle), piece.shape)
            for rectangle, piece in self.rectangles.pieces(self.local)
        ]

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.local)
        return [
            WriteItem(
                MetadataIndex(name, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return next(
            piece
            for rectangle, piece in self.rectangles.pieces(self.local)
            if torch.Size(first for first, _ in rectangle) == index.offset
        )
