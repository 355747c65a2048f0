"""Decodes with decord in a process of its own, which damaged files may crash; run as a program, not imported.

It knows nothing of the library, so that it starts fast. A message is its length, 4 bytes, and JSON; what comes back
may have an array's bytes behind it, "bytes" of them.
"""

from __future__ import annotations

import json
import sys
from typing import Any, BinaryIO


def receive(stream: BinaryIO) -> dict[str, Any] | None:
    head = stream.read(4)
    return json.loads(stream.read(int.from_bytes(head, "little"))) if len(head) == 4 else None


def send(stream: BinaryIO, message: dict[str, Any], content: memoryview | bytes = b"") -> None:
    text = json.dumps({**message, "bytes": len(content)}).encode()
    stream.write(len(text).to_bytes(4, "little") + text)
    stream.write(content)
    stream.flush()


def main() -> None:
    import decord
    import numpy as np

    given, answers = sys.stdin.buffer, sys.stdout.buffer
    readers: dict[int, Any] = {}
    while (job := receive(given)) is not None:
        for number in job["drop"]:
            readers.pop(number, None)
        try:
            if job["do"] == "open":
                # With more threads decord 0.6 fails on VP9, and its frames are not the same ones each time on others.
                reader = decord.VideoReader(job["path"], num_threads=1, height=job["height"], width=job["width"])
                readers[job["id"]] = reader
                times = reader.get_frame_timestamp(range(len(reader)))[:, 0].astype(np.float64)
                send(answers, {"frames": len(reader)}, times.tobytes())
                del reader
            elif job["do"] == "read":
                frames = np.ascontiguousarray(readers[job["id"]].get_batch(job["numbers"]).asnumpy())
                send(answers, {"shape": frames.shape}, frames.data.cast("B"))
            else:
                readers.pop(job["id"], None)
                send(answers, {})
        except Exception as error:
            send(answers, {"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
