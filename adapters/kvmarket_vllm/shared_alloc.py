"""Let vLLM allocate its KV cache in shared memory, without changing vLLM.

vLLM since 0.31 asks a connector for a context in which it allocates. Inside it, the ``torch.zeros(n, dtype=int8)`` on
the CPU that makes the KV cache is answered with a tensor over a memfd, which peers can map. Older versions make the
connector just before they allocate and register the tensors just after, so there the context spans these two calls.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from kvmarket.errors import KVMarketError
from kvmarket.region import SharedMemory

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

logger = logging.getLogger(__name__)


class SharedAllocation(TorchFunctionMode):
    """While entered, CPU int8 zeros of this thread come from shared memory; `memories` keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self.memories: list[SharedMemory] = []
        self._spanning = False

    def span_until_registered(self) -> None:
        """Enter now, on this thread; `end_span` leaves."""
        self._spanning = True
        self.__enter__()

    def end_span(self) -> None:
        """Leave what `span_until_registered` entered. Idempotent."""
        if self._spanning:
            self._spanning = False
            self.__exit__(None, None, None)

    def keep_only(self, used: Sequence[SharedMemory]) -> None:
        """Give back memories that turned out not to be KV cache; tensors over them stay valid."""
        for memory in self.memories:
            if memory not in used:
                memory.close()
        self.memories = list(used)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Redirect the KV cache allocation; leave every other call alone."""
        kwargs = dict(kwargs or {})
        if func is torch.zeros and kwargs.get("dtype") is torch.int8:
            device = torch.device(kwargs.get("device") or "cpu")
            size = torch.Size(args[0] if args and isinstance(args[0], tuple | list) else args)
            if device.type == "cpu" and size.numel() > 0:
                try:
                    memory = SharedMemory(size.numel(), "vllm-kv-cache")
                except KVMarketError as error:  # the engine then has an ordinary KV cache, which is not shared
                    logger.warning("kvmarket: the KV cache is not shared: %s", error)
                else:
                    memory.populate()
                    self.memories.append(memory)
                    return torch.from_numpy(memory.array).view(torch.int8).view(size)
        return func(*args, **kwargs)
