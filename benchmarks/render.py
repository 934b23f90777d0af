"""Milliseconds a frame of mesh + flags + render, one thread, against Embree in the same run.

    python benchmarks/render.py [--threads 2] [--output benchmarks/results/render.json]

Mean over 3 scenes × 4 angles of an orbit. Embree (embreex through trimesh) gets the same mesh and one ray a pixel.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from ex4d.geometry.camera import Camera, intrinsics, look_at, pixel_rays
from ex4d.geometry.mesh import build
from ex4d.geometry.render import cpu

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "geometry"))


def cases(size: tuple[int, int]) -> list:
    from geometry_scenes import random_scene

    jobs = []
    for seed in range(3):
        frame, z_depth = random_scene(seed, size)
        radius = 1.06 * float(np.percentile(z_depth, 1))
        for angle in np.radians((10, 30, 60, 90)):
            eye = [radius * np.sin(angle), 0, radius * (1 - np.cos(angle))]
            jobs.append((frame, z_depth, Camera(intrinsics(size), look_at(eye, [0, 0, radius]), size)))
    return jobs


def timed(function, repeats: int = 3) -> float:
    """Return the least milliseconds of a few calls: other programs share the machine."""
    best = np.inf
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return 1000 * best


def measure(size: tuple[int, int], threads: int, embree: bool) -> dict:
    jobs = cases(size)
    meshes = [build(frame, z_depth, camera.K) for frame, z_depth, camera in jobs]
    cpu.render(meshes[0], jobs[0][2])  # compiled once
    result = {
        "size": list(size),
        "build_ms": float(np.mean([timed(lambda j=j: build(j[0], j[1], j[2].K)) for j in jobs])),
        "render_ms": float(
            np.mean([timed(lambda m=m, j=j: cpu.render(m, j[2])) for m, j in zip(meshes, jobs, strict=True)])
        ),
    }
    result["total_ms"] = result["build_ms"] + result["render_ms"]
    with ThreadPoolExecutor(threads) as pool:
        work = [(m, j[2]) for m, j in zip(meshes, jobs, strict=True)]
        result[f"render_ms_{threads}_threads"] = timed(lambda: list(pool.map(lambda w: cpu.render(*w), work))) / len(
            jobs
        )
    if embree:
        import trimesh
        from trimesh.ray.ray_pyembree import RayMeshIntersector

        mesh, camera = meshes[1], jobs[1][2]
        shape = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
        rays = pixel_rays(size, camera.K).reshape(-1, 3) @ camera.w2c[:3, :3]
        origins = np.broadcast_to(camera.eye, rays.shape)
        start = time.perf_counter()
        tracer = RayMeshIntersector(shape)
        tracer.intersects_first(origins[:1], rays[:1])
        result["embree_build_ms"] = 1000 * (time.perf_counter() - start)
        result["embree_render_ms"] = timed(lambda: tracer.intersects_first(origins, rays), 1)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    report = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {platform.python_version()}",
        "results": [measure((512, 512), arguments.threads, True), measure((576, 1024), arguments.threads, False)],
    }
    report["peak_memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
