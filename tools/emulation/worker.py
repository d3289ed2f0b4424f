"""The process that runs emulated kernels: a script of its own, which imports torch and nothing of
this package (the operators it loads bear the same names as the real library's).

Reads requests from stdin and answers on stdout, each a length and a torch.save of that many bytes:
(operator, arguments, seed, device's figures) -> (arguments after the call, counters as JSON, error
or None). Where an argument is a meta tensor, launches are only listed, for tensors whose memory is
never touched, and no arguments come back.
"""

from __future__ import annotations

import ctypes
import io
import os
import struct
import sys
from typing import IO, Any

if __name__ == "__main__":
    del sys.path[0]  # this file's folder: its modules must hide nobody else's

import torch

HEADER = struct.Struct("<q")


def receive(stream: IO[bytes]) -> Any:
    header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    body = stream.read(HEADER.unpack(header)[0])
    return torch.load(io.BytesIO(body), weights_only=False)


def send(stream: IO[bytes], message: Any) -> None:
    buffer = io.BytesIO()
    torch.save(message, buffer)
    stream.write(HEADER.pack(buffer.tell()))
    stream.write(buffer.getvalue())
    stream.flush()


def on_exact_heap(arguments: list[Any]) -> list[Any]:
    """The tensors on storages of their own, exactly as large as they were: views of one storage
    stay views of one storage, and the sanitizer sees every byte after its end."""
    storages: dict[int, torch.UntypedStorage] = {}

    def move(value: Any) -> Any:
        if isinstance(value, list):
            return [move(one) for one in value]
        if not isinstance(value, torch.Tensor):
            return value
        if value.is_meta:
            return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype)
        old = value.untyped_storage()
        new = storages.setdefault(old._cdata, old.clone())
        return torch.empty(0, dtype=value.dtype).set_(
            new, value.storage_offset(), value.size(), value.stride()
        )

    return [move(value) for value in arguments]


def tensors(argument: Any) -> list[torch.Tensor]:
    """Those of an argument: itself, or those of a list."""
    given = argument if isinstance(argument, list) else [argument]
    return [value for value in given if isinstance(value, torch.Tensor)]


def call(library: ctypes.CDLL, op: str, arguments: list[Any]) -> None:
    """Calls the operator, its tensors' memory known to the counters by the schema's names. Last
    arguments may be left out."""
    function = getattr(torch.ops.densenet_efficient, op).default
    library.de_emulation_name_range(None, None, ctypes.c_longlong(0))
    for parameter, argument in zip(function._schema.arguments, arguments, strict=False):
        for value in tensors(argument):
            storage = value.untyped_storage()
            library.de_emulation_name_range(
                parameter.name.encode(),
                ctypes.c_void_p(storage.data_ptr()),
                ctypes.c_longlong(storage.nbytes()),
            )
    function(*arguments)


def main() -> None:
    requests = sys.stdin.buffer
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever else is printed goes to stderr
    torch.set_num_threads(1)
    torch.ops.load_library(sys.argv[1])
    library = ctypes.CDLL(sys.argv[1])
    library.de_emulation_report.restype = ctypes.c_char_p
    while (request := receive(requests)) is not None:
        op, arguments, seed, figures = request
        listing = any(value.is_meta for a in arguments for value in tensors(a))
        arguments = on_exact_heap(arguments)
        library.de_emulation_set_listing(int(listing))
        library.de_emulation_set_seed(ctypes.c_ulonglong(seed))
        library.de_emulation_set_device(*figures)
        error = None
        try:
            call(library, op, arguments)
        except RuntimeError as failure:
            error = str(failure)
        if listing:
            arguments = []
        send(replies, (arguments, library.de_emulation_report().decode(), error))


if __name__ == "__main__":
    main()
