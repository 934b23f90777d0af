"""The worker of `ex4d.depth.foreign`: runs under a foreign Python, with only the standard library and NumPy.

    python foreign_worker.py ADAPTER.py

An adapter of a depth network has `load(options) -> model`, called once, and `estimate(model, frames) -> dict`, called
for each clip with uint8 [T, H, W, 3]. The dict holds `values` [T, H, W] and `kind` ("z_depth" or "disparity"); it may
hold `metric` (bool), `K` [3, 3], `w2c` [T, 4, 4] and `confidence` [T, H, W]. Our adapter of COLMAP gets other arrays.

A message is a line of JSON, {"arrays": [[name, dtype, shape], …], …}, followed by the bytes of the arrays in that
order. Requests arrive on standard input; answers go to the original standard output. Prints go to standard error.
"""

import importlib.machinery
import json
import os
import sys
import traceback
import types

import numpy as np

ARRAYS = ("values", "K", "w2c", "confidence")
MAX_ERROR = 4000  # characters


def receive(stream):
    """Read the next message as (the object, {name: array}); None at the end of the input."""
    line = stream.readline()
    if not line:
        return None
    message = json.loads(line)
    arrays = {}
    for name, dtype, shape in message["arrays"]:
        count = int(np.prod(shape))
        data = stream.read(count * np.dtype(dtype).itemsize)
        arrays[name] = np.frombuffer(data, dtype).reshape(shape)
    return message, arrays


def send(stream, message, arrays):
    """Write one message."""
    parts = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    message = dict(message, arrays=[[name, part.dtype.str, list(part.shape)] for name, part in parts.items()])
    stream.write(json.dumps(message).encode() + b"\n")
    for part in parts.values():
        stream.write(part.tobytes())
    stream.flush()


def said(error):
    """Return the text of an error for the caller; print its traceback to standard error."""
    traceback.print_exc()
    return f"{type(error).__name__}: {error}"[:MAX_ERROR]


def main():
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # prints of libraries must not end up in the answers
    loader = importlib.machinery.SourceFileLoader("adapter", sys.argv[1])
    adapter = types.ModuleType("adapter")
    model = None
    try:
        options = receive(sys.stdin.buffer)[0]["options"]
        loader.exec_module(adapter)
        model = adapter.load(options)
        send(answers, {"ready": True}, {})
    except Exception as error:  # noqa: BLE001 (it crosses to the caller, who decides)
        send(answers, {"error": said(error)}, {})
        return
    while True:
        request = receive(sys.stdin.buffer)
        if request is None:
            return
        try:
            result = adapter.estimate(model, *request[1].values())
            arrays = {name: np.asarray(result[name]) for name in ARRAYS if result.get(name) is not None}
            send(answers, {"kind": result["kind"], "metric": bool(result.get("metric", False))}, arrays)
        except Exception as error:  # noqa: BLE001 (it crosses to the caller, who decides)
            send(answers, {"error": said(error)}, {})


if __name__ == "__main__":
    main()
