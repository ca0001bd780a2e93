# mypy: allow-untyped-calls
"""Stages whose tensors are fake ones on `cuda:0`: what mixes devices raises, and what a GPU would wait for is seen.

It works with a build of torch that knows no CUDA, and with any size: no tensor has memory. What is watched beside the
devices: operations for which the host waits, copies of pageable memory to the GPU, and bytes that are alive at once.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch
import transformers.masking_utils
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

from pipetune.bench.models.resolve import ResolvedModel
from pipetune.bench.models.torch_private import ASKS
from pipetune.bench.runtime.stage.activations import TaskMemory
from pipetune.bench.runtime.stage.parts import Parts
from pipetune.bench.runtime.stage.stage import Stage

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten


def _place() -> str:
    """The last line of transformers or of ours that leads here."""
    own = ("transformers", "/bench/")
    frames = [
        frame
        for frame in traceback.extract_stack()
        if any(part in frame.filename for part in own) and not frame.filename.endswith("activations.py")
    ]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"


class Watch(TaskMemory):
    """What operations on fake tensors would do on a GPU; answers what is asked of the host, so that work goes on."""

    SIZES: ClassVar = (
        *(aten.nonzero.default, aten._unique2.default, aten.masked_select.default, aten.repeat_interleave.Tensor),
        *(aten.unique_consecutive.default, aten.bincount.default),
    )
    """Operations whose result is as large as the numbers say: the host waits for its size."""

    def __init__(self) -> None:
        super().__init__("cuda")
        self.operations = 0
        self.syncs: collections.Counter[str] = collections.Counter()
        self.copies: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.operations += 1
        if func in (*ASKS, *self.SIZES) and args[0].device.type == "cuda":
            self.syncs[f"{func} {_place()}"] += 1
        if func is aten._grouped_mm.default and args[0].dtype is not torch.bfloat16:
            self.syncs[f"{func} in {args[0].dtype} {_place()}"] += 1
        result = super().__torch_dispatch__(func, kinds, args, kwargs)
        self._copies(func, [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)], result)
        return result

    def _copies(self, func: Any, given: list[torch.Tensor], result: Any) -> None:
        kinds = {tensor.device.type for tensor in given}
        made = {leaf.device.type for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)}
        if kinds == {"cpu"} and made == {"cuda"}:
            self.copies[f"to the GPU {_place()}"] += 1
        if kinds == {"cuda"} and made == {"cpu"}:
            self.syncs[f"to the host {_place()}"] += 1
        if kinds == {"cpu", "cuda"} and func in (aten.copy_.default, aten.index_put_.default, aten.index.Tensor):
            self.copies[f"{func} of both {_place()}"] += 1


def _guard_cuda() -> None:
    """Lets a build of torch without CUDA switch to a fake GPU, which changes nothing: as it does for `meta`.

    Indexing, copies and some kernels ask for this before they look at what the tensors are.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 15).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    cuda, meta = 1, 14
    guards[cuda] = guards[cuda] or guards[meta]


class FakeGpu:
    """Makes stages whose tensors are fake, and runs work on them."""

    def __init__(self) -> None:
        _guard_cuda()
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)

    def stage(self, resolved: ResolvedModel, first: int, end: int, num_layers: int) -> Stage:
        """Layers `[first, end)` of a model."""
        with mock.patch.object(Parts, "_build_dummy", lambda parts, prune: self._build(parts, prune)):
            stage = Stage(resolved, CUDA)
            stage.assign(first, end, is_first=first == 0, is_last=end == num_layers)
        return stage

    def _build(self, parts: Any, prune: Callable[[Any], None]) -> Any:
        spec = parts._resolved.spec
        with torch.device("meta"):
            model = parts._family._from_config(
                parts._config, dtype=parts._dtype, attn_implementation=spec.attn_implementation
            )
        prune(model)
        made: dict[int, Any] = {}

        def fake(tensor: torch.Tensor) -> Any:
            if id(tensor) not in made:
                empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=CUDA)
                is_parameter = isinstance(tensor, nn.Parameter)
                made[id(tensor)] = tensor, nn.Parameter(empty, requires_grad=False) if is_parameter else empty
            return made[id(tensor)][1]

        with self._mode:
            for module in model.modules():
                for tensors in (module._parameters, module._buffers):
                    tensors.update({name: fake(tensor) for name, tensor in tensors.items() if tensor is not None})
                for name, value in list(vars(module).items()):
                    if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor):
                        setattr(module, name, fake(value))
        return model.eval()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Within it, work on stages is done with fake tensors."""
        # transformers takes fake tensors for traced ones, and then leaves out what asks the host.
        never = mock.patch.object(transformers.masking_utils, "is_tracing", return_value=False)
        capability = mock.patch("torch.cuda.get_device_capability", return_value=(9, 0))
        with never, capability, self._mode, torch.inference_mode():
            yield
