"""Weights that are still in their file: transformers maps safetensors, and pages come in as they are read."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_DONTNEED, _HUGEPAGE = 4, 14
_LARGE = 2 << 20


def release(tensor: Tensor) -> None:
    """Give back the memory of a tensor that was read from a mapped file; its pages come in again should it be needed.

    Without this they count as this process's until the last tensor of the file is gone. Done on Linux, and only where
    it cannot change a value: every page is the file's own, none was written to.
    """
    if not sys.platform.startswith("linux") or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return
    page = mmap.PAGESIZE
    first = -(-tensor.data_ptr() // page)
    last = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // page
    if last > first and _all_of_a_file(first, last):
        size = ctypes.c_size_t((last - first) * page)
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first * page), size, _DONTNEED)


def large_pages(tensor: Tensor) -> None:
    """Ask for pages of 2 MB for a tensor that nothing was written to yet: 5-10 % more of the memory's speed when it is
    read from end to end (measured). On Linux, and where the system likes to."""
    first = -(-tensor.data_ptr() // _LARGE) * _LARGE
    size = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // _LARGE * _LARGE - first
    if sys.platform.startswith("linux") and tensor.device.type == "cpu" and size > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), _HUGEPAGE)


def is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor lies in a mapped file (known on Linux only, else False). Its first element is read."""
    if not sys.platform.startswith("linux") or tensor.device.type != "cpu" or not tensor.numel():
        return False
    tensor.flatten()[0].item()
    page = tensor.data_ptr() // mmap.PAGESIZE
    return _all_of_a_file(page, page + 1)


def mapped_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights that lie in mapped files and are read in every step."""
    found = {tensor.data_ptr(): tensor for tensor in model.parameters() if is_mapped(tensor)}
    apart = {module.weight.data_ptr() for module in model.modules() if isinstance(module, MappedEmbedding)}
    return sum(tensor.numel() * tensor.element_size() for at, tensor in found.items() if at not in apart)


class MappedEmbedding(nn.Module):
    """``nn.Embedding`` on a weight that lies in a mapped file, whose rows are read by :func:`rows_of`."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self._rows = rows_of(weight)

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [...] -> [..., in]."""
        rows: Tensor = self._rows(ids.flatten()).unflatten(0, ids.shape)
        return rows

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, {self.weight.shape[1]}, mapped"


def rows_of(tensor: Tensor) -> Callable[[Tensor], Tensor]:
    """A function from ids, int64 [n], to ``tensor[ids]``; IndexError for an id out of range.

    Rows of a mapped file are read from the file, because a page that is touched in memory counts as this process's,
    with all that the system maps along with it: up to 2 MB for a row.
    """
    tensor = tensor.detach()
    found = _FileRows.of(tensor) if tensor.dim() == 2 and tensor.is_contiguous() and is_mapped(tensor) else None
    return found or tensor.__getitem__


class _FileRows:
    def __init__(self, tensor: Tensor, file: int, offset: int) -> None:
        self._tensor, self._file, self._offset = tensor, file, offset
        weakref.finalize(self, os.close, file).atexit = False

    @classmethod
    def of(cls, tensor: Tensor) -> _FileRows | None:
        """None when the file that is mapped cannot be opened, or another one has taken its place."""
        with contextlib.suppress(OSError):
            for span, offset, inode, path in _mapped_files():
                if tensor.data_ptr() in span:
                    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                    found = cls(tensor, file, offset + tensor.data_ptr() - span.start)
                    release(tensor)
                    # Its number is the file's alone as long as it is mapped. (The device is another on some systems.)
                    return found if os.fstat(file).st_ino == inode else None
        return None

    def __call__(self, ids: Tensor) -> Tensor:
        count, width = self._tensor.shape
        places = ids.tolist()
        if places and not 0 <= min(places) <= max(places) < count:
            raise IndexError(f"ids from {min(places)} to {max(places)} for {count} rows")
        rows = self._tensor.new_empty(len(places), width)
        size = width * rows.element_size()
        into = rows.view(torch.uint8).flatten().numpy().data
        for at, place in enumerate(places):
            if os.preadv(self._file, [into[at * size : (at + 1) * size]], self._offset + place * size) != size:
                raise OSError("a file of weights has become shorter while its model was in use")
        return rows

    def __deepcopy__(self, memo: Any) -> _FileRows:
        return self  # nothing in it changes

    def __reduce__(self) -> tuple[Any, ...]:
        return rows_of, (self._tensor,)  # another process has other files open


def _mapped_files() -> Iterator[tuple[range, int, int, str]]:
    """Addresses, where in a file they begin, its inode and its path, for all files that this process maps (proc(5))."""
    with open("/proc/self/maps", encoding="utf-8") as maps:
        for line in maps:
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5].startswith("/"):
                first, last = (int(number, 16) for number in fields[0].split("-"))
                yield range(first, last), int(fields[2], 16), int(fields[4]), fields[5].rstrip("\n")


def _all_of_a_file(first: int, last: int) -> bool:
    """Whether those pages that are there have no contents but a file's (/proc/self/pagemap: eight bytes a page)."""
    with contextlib.suppress(OSError), open("/proc/self/pagemap", "rb") as file:
        file.seek(first * 8)
        entries = torch.frombuffer(bytearray(file.read((last - first) * 8)), dtype=torch.int64)
        held = (entries >> 62) & 3 != 0  # present, or swapped out
        return len(entries) == last - first and bool(held.any()) and bool(((entries >> 61) & 1)[held].all())
    return False
