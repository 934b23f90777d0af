"""Get the source's cameras in the unit of the depth, even if depth and cameras come from different programs.

| `cameras` | the source's cameras are |
|---|---|
| `auto` | the depth estimator's if it has them; else the source is assumed not to move |
| `none` | not used: the source is assumed not to move |
| `estimator` | the depth estimator's; a clip without them is rejected |
| `parallax` | estimated from optical flow, also for a camera that rests or turns |
| `colmap` | estimated by COLMAP from the static ones of the points that parallax tracks |
| a file | its poses, as `geometry.trajectory_files` reads them |

With z-depth or metric disparity, parallax finds the cameras that explain the flow together with that depth, which
removes the ambiguities between depth and motion and keeps static surfaces static. Otherwise it finds them from the flow
alone (`depth.cameras`). The same step runs before COLMAP: it says which points move by themselves and whether the
camera translates at all; if the camera rests or only turns, COLMAP is skipped.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from ex4d.depth import DepthRequest, Geometry, bundle, cameras, colmap, parallax
from ex4d.depth.camera_unit import MIN_POINTS, at_points, in_one_unit, measured, relative, weighted_median
from ex4d.errors import BadSample, ConfigError, Filtered
from ex4d.geometry import trajectory_files
from ex4d.geometry.camera import FOV_DEG, intrinsics, invert
from ex4d.geometry.tracks import Flows, measure_again, one_thread, pair_flows, trust

CHOICES = ("auto", "none", "estimator", "parallax", "colmap")
TURNS_PX = 1.0  # median residual of a pure turn above which a clip without parallax is not that of a turning camera
MOVES = 0.01  # fraction of the median depth; cameras that move less cannot triangulate points to compare depth with
MOVES_SURELY = 0.3  # a smaller move found with z-depth may be that of bodies, so parallax must confirm it
GAPS = (1, 2, 4, 8)
# After each round but the last, flow is dropped whose residual exceeds this × the median and this many px: bodies.
NUM_TRIMS, TRIM_RATIO, TRIM_PX = 3, 2.0, 0.15
NUM_AGAIN = 2  # rounds that measure the flow again, from the positions that the previous cameras predict


def check(choice: str) -> None:
    """Raise ConfigError unless `choice` is one of CHOICES whose package is installed, or a file."""
    if choice == "colmap":
        colmap.check()
    if choice not in CHOICES and not Path(choice).is_file():
        raise ConfigError("cameras", choice, f"must be one of {', '.join(CHOICES)}, or a pose file")


def joined(result: Geometry, frames: np.ndarray, request: DepthRequest) -> Geometry:
    """Add the source's cameras that `request.cameras` selects to the geometry, in the unit of its depth.

    Its `provenance` then has `cameras`, and `camera_depth_error` if the unit had to be found.

    Raises:
        BadSample: cameras_missing: the estimator has none, the file has too few, they contradict the depth, or COLMAP
            does not register every frame; depth_worker_*: COLMAP died, hung or gave an invalid answer.
        Filtered: no_parallax: parallax finds no camera.
    """
    choice = request.cameras
    check(choice)
    if choice in ("auto", "estimator"):
        if result.w2c is None and choice == "estimator":
            raise BadSample("cameras_missing", "the depth has no cameras: set cameras to parallax, none or a file")
        return _with_facts(result, "none" if result.w2c is None else "estimator")
    if choice == "none":
        return _with_facts(replace(result, w2c=None), "none")
    if choice == "parallax" and result.provenance.get("estimator") == "parallax":
        return _with_facts(result, "parallax")
    if len(frames) == 1:
        return _with_facts(replace(result, w2c=np.eye(4)[None]), choice)
    with one_thread():
        return _of_flow(result, frames, request)


def _of_flow(result: Geometry, frames: np.ndarray, request: DepthRequest) -> Geometry:
    """Add the cameras of parallax, COLMAP or a file to the geometry; flow determines them, or their unit."""
    choice, size = request.cameras, (frames.shape[1], frames.shape[2])
    flows = pair_flows(frames, GAPS)
    matches = parallax.matches_of(flows, trust(flows))
    if choice in ("parallax", "colmap") and not relative(result):
        for _ in range(NUM_AGAIN):
            flows = _measured_again(frames, flows, _of_depth(result, matches, size, request.fov_deg))
            matches = parallax.matches_of(flows, trust(flows))
    if choice == "parallax" and not relative(result):
        return _of_depth(result, matches, size, request.fov_deg)
    focal: float | None = None
    if choice == "parallax":
        found = _from_motion(matches, size, request.fov_deg)
        if found.w2c[:, :3, 3].any():
            narrow = {pair: flow for pair, flow in flows.items() if abs(pair[1] - pair[0]) <= max(parallax.GAPS)}
            found = parallax.refined(frames, narrow, found, request.fov_deg)[0]
        w2c, focal = found.w2c @ invert(found.w2c[0]), found.focal
    elif choice == "colmap":
        w2c, focal = _by_colmap(result, matches, size, request.fov_deg)
    else:
        w2c = _of_file(request, len(frames))
    if result.K is None:
        K = intrinsics(size, request.fov_deg)
        K[[0, 1], [0, 1]] = focal or K[0, 0]
        result = replace(result, K=K)
    result, error = in_one_unit(replace(result, w2c=w2c), matches, focal)
    return _with_facts(result, choice, error)


def _with_facts(result: Geometry, choice: str, error: float | None = None) -> Geometry:
    facts = {"cameras": choice} | ({} if error is None else {"camera_depth_error": error})
    return replace(result, provenance={**result.provenance, **facts})


def _of_depth(result: Geometry, matches: bundle.Matches, size: tuple[int, int], fov_deg: float | None) -> Geometry:
    """Add the cameras that explain the flow together with the z-depth, fitted robustly, in its unit."""
    solution, matches, _ = _explained(result, matches, size, fov_deg)
    inverse, valid = solution.inverse, measured(result, matches)
    w2c = solution.w2c @ invert(solution.w2c[0])
    focal = solution.focal
    if _is_doubtful(_moved(w2c, inverse[valid])) and (turned := _at_rest(matches, size, fov_deg)) is not None:
        if result.K is not None:
            turned = cameras.turning(_standing(matches, turned), float(result.K[0, 0]), False)
        w2c, focal = turned.w2c @ invert(turned.w2c[0]), turned.focal
    K = result.K if result.K is not None else intrinsics(size, fov_deg)
    if result.K is None and fov_deg is None:
        K[[0, 1], [0, 1]] = focal
    points = bundle.points_of(matches, replace(solution, w2c=w2c))
    sure = cameras.known_points(points) & (points.inverse > 1e-6) & valid
    error = 0.0
    if _moved(w2c, inverse[valid]) > MOVES and sure.any():
        error = weighted_median(np.abs(np.log(inverse[sure] / points.inverse[sure])), np.sqrt(points.information[sure]))
    return _with_facts(replace(result, w2c=w2c, K=K), "parallax", error)


def _measured_again(frames: np.ndarray, flows: Flows, found: Geometry) -> Flows:
    """Measure the flows again, starting where depth and cameras predict each pixel with depth."""
    assert found.w2c is not None
    assert found.K is not None
    inverse = 1 / found.values if found.kind == "z_depth" else np.maximum(found.values, 1e-9)
    starts = parallax.induced(inverse, found.w2c, float(found.K[0, 0]), flows)
    if found.valid_mask is not None:
        starts = {(i, j): np.where(found.valid_mask[i][..., None], starts[i, j], flows[i, j]) for i, j in flows}
    return measure_again(frames, starts)


def _moved(w2c: np.ndarray, inverse: np.ndarray) -> float:
    """Return how far the cameras move away from the first, in median depths of points with these inverse depths."""
    return float(np.linalg.norm(w2c[:, :3, 3], axis=1).max()) * float(np.median(inverse))


def _explained(
    result: Geometry, matches: bundle.Matches, size: tuple[int, int], fov_deg: float | None
) -> tuple[bundle.Bundle, bundle.Matches, bundle.Matches]:
    """Return (the cameras that explain the flow with the z-depth, the matches with depth, those that do not move)."""
    values, valid = at_points(result.values, matches).astype(np.float64), measured(result, matches)
    matches = replace(matches, weights=matches.weights * valid[matches.pairs[:, 0]])
    if np.count_nonzero(matches.weights) < MIN_POINTS:
        raise BadSample("cameras_missing", "too few tracked points with depth to estimate the cameras")
    inverse = 1 / values if result.kind == "z_depth" else np.maximum(values, 1e-9)
    known = fov_deg is not None or result.K is not None
    usual = cameras.focal_of(size, fov_deg or FOV_DEG) if result.K is None else float(result.K[0, 0])
    solution = replace(cameras.turning(matches, usual, not known), inverse=inverse, information=np.ones_like(inverse))
    inliers = matches
    for trim in range(NUM_TRIMS + 1):
        solution = bundle.adjust(inliers, solution, 30, None if known else usual, fixed_points=True)
        if trim < NUM_TRIMS:
            inliers = _standing(matches, solution)
    return solution, matches, inliers


def _standing(matches: bundle.Matches, solution: bundle.Bundle) -> bundle.Matches:
    """Drop the matches that the solution leaves unexplained: moving bodies and errors of the flow."""
    residual = np.sqrt(bundle.squared_residuals(matches, solution))
    limit = max(TRIM_PX, TRIM_RATIO * float(np.median(residual[matches.weights > 0])))
    return replace(matches, weights=matches.weights * (residual < limit))


def _by_colmap(
    result: Geometry, matches: bundle.Matches, size: tuple[int, int], fov_deg: float | None
) -> tuple[np.ndarray, float]:
    """Return (w2c [T, 4, 4], focal length in px) by COLMAP, or by parallax without translation if the camera rests.

    The focal length is estimated for the reason given in `_from_motion`.
    """
    if relative(result):
        solution = _from_motion(matches, size, fov_deg)
        inliers, moved = _standing(matches, solution), float(np.abs(solution.w2c[:, :3, 3]).max())
    else:
        solution, matches, inliers = _explained(result, matches, size, fov_deg)
        solution = replace(solution, w2c=solution.w2c @ invert(solution.w2c[0]))
        moved = _moved(solution.w2c, solution.inverse[measured(result, matches)])
        if _is_doubtful(moved) and (turned := _at_rest(matches, size, fov_deg)) is not None:
            solution, moved = replace(solution, w2c=turned.w2c), 0.0
    if moved < MOVES:
        w2c = solution.w2c.copy()
        w2c[:, :3, 3] = 0
        return w2c, solution.focal
    return colmap.cameras(inliers, size, solution.focal, fov_deg is None)


def _is_doubtful(moved: float) -> bool:
    """Return whether a move found with z-depth, `moved` in median depths, may be that of bodies."""
    return MOVES <= moved < MOVES_SURELY


def _at_rest(matches: bundle.Matches, size: tuple[int, int], fov_deg: float | None) -> bundle.Bundle | None:
    """Return the cameras if parallax finds, without the depth, that they rest or only turn; else None."""
    try:
        found = _from_motion(matches, size, fov_deg)
    except Filtered:
        return None
    return None if found.w2c[:, :3, 3].any() else found


def _from_motion(matches: bundle.Matches, size: tuple[int, int], fov_deg: float | None) -> bundle.Bundle:
    """Return the cameras by parallax, the first the identity; without translation if the camera rests or turns.

    The focal length is estimated even if the depth has one: flow that is a little too short bends the path more with
    the true focal length than with the one that fits it (docs/decisions/source_cameras.md).
    """
    # Over wider gaps the flow's own error, which grows with its length, looks like a translation.
    gaps = np.abs(matches.pairs[:, 1] - matches.pairs[:, 0])
    try:
        solution = cameras.find(matches.only(gaps <= max(parallax.GAPS)), size, fov_deg)
        if solution.certainty < parallax.MIN_CERTAINTY:
            raise Filtered(
                "parallax_certainty", solution.certainty, parallax.MIN_CERTAINTY, "near and far cannot be told apart"
            )
        return solution.bundle
    except Filtered as error:
        turned = cameras.turning(matches, cameras.focal_of(size, fov_deg or FOV_DEG), fov_deg is None)
        left = np.sqrt(bundle.squared_residuals(matches, turned)[matches.weights > 0.5])
        if error.reason != "no_parallax" or not left.size or np.median(left) > TURNS_PX:
            raise
        w2c = turned.w2c @ invert(turned.w2c[0])
        w2c[:, :3, 3] = 0
        return replace(turned, w2c=w2c)


def _of_file(request: DepthRequest, num_frames: int) -> np.ndarray:
    """Return w2c [T, 4, 4] of the clip's frames, the first the identity."""
    w2c = trajectory_files.read(request.cameras).w2c
    index = np.arange(num_frames) if request.frame_index is None else request.frame_index
    if index.max() >= len(w2c):
        name = Path(request.cameras).name
        raise BadSample("cameras_missing", f"{name} has {len(w2c)} poses, but the clip needs frame {index.max()}")
    return w2c[index] @ invert(w2c[index[0]])
