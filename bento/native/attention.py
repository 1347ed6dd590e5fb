"""Attention within each text of a pack by the function of `attention_program`."""

import struct

import torch

from bento.native.attention_program import Call, room_bytes, step
from bento.native.machine_code import attend, kind_of, missing


def unfit(width: int, dtype: torch.dtype, device: torch.device) -> str:
    """Why attention of heads of this width in `dtype` cannot be had here; empty: it can."""
    if gap := missing(dtype, device):
        return gap
    multiple = step(kind_of(dtype))
    return f"heads are {width} wide, no multiple of {multiple}" if width % multiple else ""


def attended(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, bounds: torch.Tensor
) -> torch.Tensor:
    """softmax(scale * q k^T) v within each text, [1, tokens, heads, width]; zeros where there is no text.

    Args:
        query: [1, heads, tokens, width], as the other two; not `unfit`.
        bounds: long [texts, 2]: first token of each text, and the one after its last; in order.

    Raises:
        ValueError: A text ends beyond the tokens.
    """
    _, heads, tokens, width = query.shape
    end = int(bounds[-1, 1])
    if end > tokens:
        raise ValueError(f"a text ends at token {end} of {tokens}")
    rows = [each[0].transpose(0, 1).reshape(tokens, heads * width) for each in (query, key, value)]
    if {each.stride() for each in rows} != {(rows[0].stride(0), 1)}:
        rows = [each.contiguous() for each in rows]
    output = query.new_empty(1, tokens, heads, width)
    output[:, end:] = 0
    kind = kind_of(query.dtype)
    per_thread = room_bytes(int((bounds[:, 1] - bounds[:, 0]).max()), kind, width)
    threads = torch.get_num_threads()
    room = torch.empty(per_thread * threads, dtype=torch.uint8)
    queries, keys, values = rows
    call = Call(
        query=queries.data_ptr(),
        key=keys.data_ptr(),
        value=values.data_ptr(),
        input_bytes=queries.stride(0) * kind.value,
        output=output.data_ptr(),
        output_bytes=heads * width * kind.value,
        bounds=bounds.data_ptr(),
        texts=len(bounds),
        heads=heads,
        scale=struct.unpack("q", struct.pack("d", scale))[0],
        room=room.data_ptr(),
        room_bytes=per_thread,
    )
    attend(kind, width)(call, threads)
    return output
