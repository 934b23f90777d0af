"""Resolve `depth: auto` once for all videos of a run: to depth files, else a small network, else parallax.

The network is Depth Anything V2 Small: Apache-2.0, 25 million parameters, fetched once, usable on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePosixPath

from ex4d import storage
from ex4d.depth import AUTO, DepthRequest, places, weight_folders
from ex4d.errors import BadSample, ConfigError

NETWORK = "depth-anything-v2"


def choose(requests: Iterable[DepthRequest], depth_path: str | None = None) -> tuple[str, str]:
    """Choose an estimator; return (key of ESTIMATORS, one line that tells the user what was chosen and why).

    Args:
        requests: one for each video; a video that cannot be read is ignored, because it is rejected anyway.
        depth_path: the setting, which must be None.

    Raises:
        ConfigError: depth_path is set.
    """
    if depth_path is not None:
        way = f"must be null with depth={AUTO}; set depth=sidecar for depth files, or depth={NETWORK} for its weights"
        raise ConfigError("depth_path", depth_path, way)
    has_file = {request.name or PurePosixPath(request.video_path).name: _has_file(request) for request in requests}
    lacking = [name for name, has in has_file.items() if has is False]
    if not lacking:
        which = "every video that can be read" if None in has_file.values() else "every video"
        return "sidecar", f"depth={AUTO}: sidecar, because {which} has a depth file"
    first = lacking[0].encode("utf-8", "backslashreplace").decode()
    why = f"since {len(lacking)} of {len(has_file)} videos have no depth file (first: {first})"
    if _has_weights():
        return NETWORK, f"depth={AUTO}: {NETWORK}, {why}"
    from ex4d.depth.transformers import NETWORKS

    return "parallax", (
        f"depth={AUTO}: parallax, {why} and the weights of {NETWORK} cannot be fetched. Parallax needs a camera that "
        "moves sideways. Other choices: depth=sidecar with NAME.depth.npz beside each video, or "
        f"`hf download {NETWORKS[NETWORK].hub_id} --local-dir FOLDER` on a machine with a network, then "
        f"depth={NETWORK} depth_path=FOLDER"
    )


def _has_file(request: DepthRequest) -> bool | None:
    """Return whether a video has an unambiguous depth file; None if the video cannot be read."""
    try:
        places.find(request)
    except BadSample:
        return False if storage.exists(request.video_path) else None
    except OSError:
        return None
    return True


def _has_weights() -> bool:
    """Return True if the network's weights are available, after trying to fetch them."""
    try:
        (folder,) = weight_folders(NETWORK, None)
    except ConfigError:
        return False
    return any(folder.glob("*.safetensors"))  # an interrupted download leaves a folder without them
