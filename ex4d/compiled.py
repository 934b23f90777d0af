"""Compile numeric functions with numba."""

from __future__ import annotations

from contextlib import suppress

from numba import njit


def kernel(function, **options):
    """Compile `function`; cache it on disk, beside the module or in numba's user folder, if possible.

    Numba compiles again when the function's own module changes, but not when a constant does that the module imports:
    pass such constants as arguments.
    """
    options = {"nogil": True, "error_model": "numpy", **options}
    try:
        found = njit(cache=True, **options)(function)
    except RuntimeError:  # numba found no writable place for its cache
        return njit(**options)(function)
    save = found._cache.save_overload

    def save_if_possible(*args):
        with suppress(OSError):  # the disk or quota is full
            save(*args)

    found._cache.save_overload = save_if_possible
    return found
