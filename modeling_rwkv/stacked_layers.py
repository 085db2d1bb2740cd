"""States of all blocks in one tensor for each part, as the kernels of the next token read and write them."""

from collections.abc import Iterator, Sequence
from typing import Any, overload

from torch import Tensor

from modeling_rwkv.cache import LayerState
from rwkv_kernels.decode_weights import Stack


class StackedLayers(Sequence[LayerState]):
    """The layers of an :class:`RwkvCache`, as views of one tensor for each part, made when they are asked for."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self._views: dict[int, LayerState] = {}

    def __reduce__(self) -> tuple[type, tuple[Stack]]:
        """Copied and pickled, its parts stay views."""
        return StackedLayers, (self.stack,)

    @classmethod
    def of(cls, layers: Sequence[LayerState]) -> "StackedLayers":
        """``layers``, copied if they are not stacked."""
        return layers if isinstance(layers, cls) else cls(Stack.of(layers))

    def empty_like(self) -> "StackedLayers":
        return StackedLayers(self.stack.empty_like())

    def __len__(self) -> int:
        return len(self.stack.wkv)

    @overload
    def __getitem__(self, index: int) -> LayerState: ...

    @overload
    def __getitem__(self, index: slice) -> list[LayerState]: ...

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [*self][index]
        if index not in self._views:
            self._views[index] = LayerState(*(part[index] for part in self.stack))
        return self._views[index]

    def __iter__(self) -> Iterator[LayerState]:
        return map(LayerState, *map(Tensor.unbind, self.stack))
