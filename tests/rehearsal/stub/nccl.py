"""NCCL's point-to-point messages over gloo: a thread for each group runs them one after the other, as its stream does.

Work that was issued is waited for by the compute, never by whoever issues more; and waiting for the device is waiting
for every message that was issued, also for a receive whose message nobody sent yet.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

_groups: dict[int, _Stream] = {}
"""By the identity of their process group."""


class _Stream:
    """Messages of one group, in order."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self._queue: queue.SimpleQueue[tuple[Callable[[], object], threading.Event] | None] = queue.SimpleQueue()
        self._outstanding = 0
        self._changed = threading.Condition()
        threading.Thread(target=self._run, name="stub-nccl", daemon=True).start()

    def put(self, message: Callable[[], object]) -> threading.Event:
        done = threading.Event()
        with self._changed:
            self._outstanding += 1
        self._queue.put((message, done))
        return done

    def drain(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._outstanding == 0)

    def end(self) -> None:
        self._queue.put(None)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            message, done = item
            message()
            done.set()
            with self._changed:
                self._outstanding -= 1
                self._changed.notify_all()


class _Work:
    """What was issued."""

    def __init__(self, done: threading.Event) -> None:
        self._done = done

    def wait(self, timeout: Any = None) -> bool:
        self._done.wait()
        return True

    def is_completed(self) -> bool:
        return self._done.is_set()


class ProcessGroupNCCL:
    """The class whose options product code makes."""

    class Options:
        def __init__(self, is_high_priority_stream: bool = False) -> None:
            self.is_high_priority_stream = is_high_priority_stream
            self.config = SimpleNamespace(blocking=0, cga_cluster_size=0, min_ctas=0, max_ctas=0)


def wait_for_messages() -> None:
    """Until every message issued so far has ended, on whatever stream."""
    for stream in list(_groups.values()):
        stream.drain()


def open_groups() -> int:
    """Groups of this process that hold a communicator."""
    return len(_groups)


def install(dist: Any) -> None:
    """Puts the stand-ins into `torch.distributed`."""
    new_group, destroy, isend, irecv = dist.new_group, dist.destroy_process_group, dist.isend, dist.irecv

    def stub_new_group(ranks: Any = None, *args: Any, **given: Any) -> Any:
        is_nccl = given.get("backend") == "nccl"
        if is_nccl:
            assert isinstance(given.pop("pg_options", None), ProcessGroupNCCL.Options | None)
            given["backend"] = "gloo"
        group = new_group(ranks, *args, **given)
        if is_nccl and group is not dist.GroupMember.NON_GROUP_MEMBER:
            _groups[id(group)] = _Stream(group)
        return group

    def stub_destroy(group: Any = None) -> None:
        stream = _groups.pop(id(group), None)
        if stream is not None:
            stream.drain()
            stream.end()
        destroy(group)

    def stub_isend(tensor: Any, dst: Any = None, group: Any = None, tag: int = 0, **rest: Any) -> Any:
        if id(group) not in _groups:
            return isend(tensor, dst=dst, group=group, tag=tag, **rest)
        return _Work(_groups[id(group)].put(lambda: isend(tensor, dst=dst, group=group).wait()))

    def stub_irecv(tensor: Any, src: Any = None, group: Any = None, tag: int = 0, **rest: Any) -> Any:
        if id(group) not in _groups:
            return irecv(tensor, src=src, group=group, tag=tag, **rest)
        return _Work(_groups[id(group)].put(lambda: irecv(tensor, src=src, group=group).wait()))

    dist.new_group, dist.destroy_process_group = stub_new_group, stub_destroy
    dist.isend, dist.irecv, dist.ProcessGroupNCCL = stub_isend, stub_irecv, ProcessGroupNCCL
