"""COLMAP (pip package pycolmap, BSD): cameras and focal length of points that were followed through a clip."""

import tempfile
from pathlib import Path

import numpy as np
import pycolmap

MIN_WEIGHT = 0.5  # of a match that is used
MAX_ERROR_PX = 1.0  # of a match against the epipolar geometry, and of a point against its cameras
MIN_ANGLE_DEG, INIT_ANGLE_DEG = 0.2, 1.0  # between the rays to a point: clips move little


def load(options):
    """Return nothing: there is no network."""
    pycolmap.logging.minloglevel = pycolmap.logging.ERROR.value
    return None


def estimate(model, places, pairs, targets, weights, lens):
    """Return w2c [T, 4, 4] and K [3, 3] of the points of `bundle.Matches`, px from the corner.

    Args:
        lens: float [5]: width, height, focal length in px, whether it is sought, and the seed.

    Raises:
        RuntimeError: COLMAP places no camera, or not all of them.
    """
    width, height, focal, is_sought, seed = (float(value) for value in lens)
    pycolmap.set_random_seed(int(seed))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "pictures").mkdir()
        ids = _write(root / "matches.db", places, pairs, targets, weights, (width, height, focal))
        models = pycolmap.incremental_mapping(
            root / "matches.db", root / "pictures", root, options=_mapping(bool(is_sought), int(seed))
        )
        found = max(models.values(), key=lambda one: one.num_reg_images()) if models else None
        count = found.num_reg_images() if found else 0
        if found is None or count < len(places):
            raise RuntimeError(f"COLMAP places {count} of {len(places)} frames: too little motion, or too much at once")
        w2c = np.tile(np.eye(4), (len(places), 1, 1))
        for number, image in enumerate(ids):
            w2c[number, :3] = found.images[image].cam_from_world().matrix()
        camera = next(iter(found.cameras.values()))
        return {"kind": "cameras", "w2c": w2c, "K": camera.calibration_matrix()}


def _write(path, places, pairs, targets, weights, lens):
    """Write COLMAP's database of the matches; return the id of each frame's image."""
    width, height, focal = lens
    centre = np.array([width / 2, height / 2])
    keys = [[place + centre] for place in places]
    joined: dict = {}
    for (i, j), target, weight in zip(pairs.tolist(), targets, weights, strict=True):
        good = np.flatnonzero(weight > MIN_WEIGHT)
        first = sum(len(part) for part in keys[j])
        keys[j].append(target[good] + centre)
        both = np.stack([good, first + np.arange(len(good))], axis=1)
        joined.setdefault((min(i, j), max(i, j)), []).append(both if i < j else both[:, ::-1])
    database = pycolmap.Database.open(path)
    camera = pycolmap.Camera.create_from_model_name(1, "SIMPLE_PINHOLE", focal, int(width), int(height))
    camera.has_prior_focal_length = True
    camera_id = database.write_camera(camera, use_camera_id=True)
    rig = pycolmap.Rig(rig_id=1)
    rig.add_ref_sensor(camera.sensor_id)
    database.write_rig(rig, use_rig_id=True)
    ids = []
    for number, parts in enumerate(keys, start=1):
        image = pycolmap.Image(name=f"{number:06d}.png", camera_id=camera_id, image_id=number)
        frame = pycolmap.Frame(frame_id=number, rig_id=1)
        frame.add_data_id(image.data_id)
        database.write_frame(frame, use_frame_id=True)
        image.frame_id = number
        ids.append(database.write_image(image, use_image_id=True))
        database.write_keypoints(number, np.concatenate(parts).astype(np.float32))
    for (i, j), parts in sorted(joined.items()):
        database.write_matches(ids[i], ids[j], np.concatenate(parts).astype(np.uint32))
    database.close()
    listed = path.with_suffix(".txt")
    listed.write_text("".join(f"{i + 1:06d}.png {j + 1:06d}.png\n" for i, j in sorted(joined)))
    verification = pycolmap.TwoViewGeometryOptions(detect_watermark=False)
    verification.ransac.max_error, verification.ransac.random_seed = MAX_ERROR_PX, 0
    pycolmap.verify_matches(path, listed, options=verification)
    return ids


def _mapping(is_sought, seed):
    """Return the options of COLMAP's mapper for a short clip of one camera."""
    options = pycolmap.IncrementalPipelineOptions(
        num_threads=1, random_seed=seed, multiple_models=False, min_model_size=2, extract_colors=False
    )
    options.ba_refine_focal_length, options.ba_refine_extra_params = is_sought, False
    mapper, points = options.mapper, options.triangulation
    mapper.random_seed = points.random_seed = seed
    mapper.num_threads = 1
    mapper.init_min_tri_angle, mapper.init_min_num_inliers = INIT_ANGLE_DEG, 50
    mapper.init_max_error, mapper.init_max_forward_motion = 2 * MAX_ERROR_PX, 1.0
    mapper.filter_min_tri_angle = mapper.ba_local_min_tri_angle = points.min_angle = MIN_ANGLE_DEG
    mapper.filter_max_reproj_error, mapper.abs_pose_max_error = MAX_ERROR_PX, 3 * MAX_ERROR_PX
    mapper.abs_pose_refine_focal_length = False
    points.ignore_two_view_tracks = False
    points.create_max_angle_error = points.continue_max_angle_error = 1.0  # degrees
    return options
