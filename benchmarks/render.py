"""Time mesh + flags + render, in ms per frame: `python benchmarks/render.py` writes results/render.{json,md}.

Mean over 3 scenes × 4 angles of an orbit, each the minimum of a few calls; process CPU time and wall time. In the same
run, Embree (embreex) gets the same mesh and one ray per pixel, without shading and without ending the curtains; the
reference renderer draws one frame. The face ids of both are compared. Takes two to three minutes on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import textwrap
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ex4d.geometry.camera import Camera, intrinsics, look_at, pixel_rays
from ex4d.geometry.mesh import PROFILES, DWMesh, build
from ex4d.geometry.render import cpu, reference

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "geometry"))
ANGLES_DEG = (10, 30, 60, 90)
SIZES = ((512, 512), (576, 1024))
TARGET_MS = 15.0  # mesh + flags + render, one thread, 512 × 512
TARGET_RATIO = 40.0  # how many times longer Embree takes, for tree and rays together
RESULTS = ROOT / "benchmarks" / "results"
Case = tuple[np.ndarray, np.ndarray, Camera]


def cases(size: tuple[int, int]) -> list[Case]:
    """Return (frame, z_depth, camera) of 3 scenes at each angle."""
    from geometry_scenes import random_scene

    found = []
    for seed in range(3):
        frame, z_depth = random_scene(seed, size)
        radius = 1.06 * float(np.percentile(z_depth, 1))
        for angle in np.radians(ANGLES_DEG):
            eye = radius * np.array([np.sin(angle), 0, 1 - np.cos(angle)])
            found.append((frame, z_depth, Camera(intrinsics(size), look_at(eye, np.array([0, 0, radius])), size)))
    return found


def timed(function: Callable[..., object], *args: Any, repeats: int = 3) -> np.ndarray:
    """Return the minimum (CPU, wall) milliseconds of a few calls, since other programs share the machine."""
    rows = []
    for _ in range(repeats):
        start = time.process_time(), time.perf_counter()
        function(*args)
        rows.append((time.process_time() - start[0], time.perf_counter() - start[1]))
    return 1000 * np.min(rows, axis=0)


def draw_frame(job: Case) -> object:
    return cpu.render(build(job[0], job[1], job[2].K), job[2])


def pair(values: np.ndarray) -> dict[str, float]:
    return {"cpu_ms": round(float(values[0]), 2), "wall_ms": round(float(values[1]), 2)}


def memory_mb(name: str) -> float:
    """Return a figure of /proc/self/status in MB: VmRSS, current memory, or VmHWM, the peak since `forget_peak`."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name + ":"))
    return int(line.split()[1]) / 1024


def forget_peak() -> float:
    """Reset the peak memory, and return the MB held now."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory_mb("VmRSS")


def measure(size: tuple[int, int]) -> dict:
    """Return the figures of one size."""
    jobs = cases(size)
    tracemalloc.start()
    meshes = [build(*jobs[0][:2], jobs[0][2].K)]
    cpu.render(meshes[0], jobs[0][2])
    result: dict = {"size": list(size), "memory_mb": {"cpu": round(tracemalloc.get_traced_memory()[1] / 2**20, 1)}}
    tracemalloc.stop()
    meshes += [build(frame, z_depth, camera.K) for frame, z_depth, camera in jobs[1:]]
    builds = np.array([timed(build, j[0], j[1], j[2].K) for j in jobs])
    draws = np.array([timed(cpu.render, m, j[2]) for m, j in zip(meshes, jobs, strict=True)])
    result["build"], result["render"], result["total"] = (pair(x.mean(0)) for x in (builds, draws, builds + draws))
    result["total_by_angle_cpu_ms"] = {
        str(angle): round(float((builds + draws)[k :: len(ANGLES_DEG), 0].mean()), 2)
        for k, angle in enumerate(ANGLES_DEG)
    }
    for threads in (1, 2):
        with ThreadPoolExecutor(threads) as pool:
            run = timed(lambda: list(pool.map(draw_frame, jobs)))
        result[f"threads_{threads}"] = pair(run / len(jobs))
    closed = [replace(mesh, profile=PROFILES["closed"]) for mesh in meshes]
    result["closed"] = pair(np.mean([timed(cpu.render, m, j[2]) for m, j in zip(closed, jobs, strict=True)], 0))
    result["embree"] = embree(closed[1 :: len(ANGLES_DEG)], [j[2] for j in jobs[1 :: len(ANGLES_DEG)]], result)
    mesh, camera = meshes[1], jobs[1][2]
    seen: list = []
    result["reference"] = pair(timed(lambda: seen.append(reference.render(mesh, camera)), repeats=1))
    same = seen[0].face_id == cpu.render(mesh, camera).face_id
    result["reference"]["equal_face_ids"] = float(same.mean())
    return result


def embree(meshes: list[DWMesh], cameras: list[Camera], result: dict) -> dict | None:
    """Return Embree's mean times for building the mesh's tree and for one ray per pixel; None without embreex."""
    try:
        from embreex.mesh_construction import TriangleMesh
        from embreex.rtcore_scene import EmbreeScene
    except ImportError:
        return None
    before, builds, draws, equal = forget_peak(), [], [], []
    for mesh, camera in zip(meshes, cameras, strict=True):
        rays = (pixel_rays(camera.size, camera.K).reshape(-1, 3) @ camera.w2c[:3, :3]).astype(np.float32)
        origins = np.broadcast_to(camera.eye.astype(np.float32), rays.shape).copy()

        scene = EmbreeScene()
        TriangleMesh(scene, mesh.vertices.astype(np.float32), mesh.faces)
        builds.append(timed(scene.run, origins[:1], rays[:1], repeats=1))  # the first call builds the tree
        draws.append(timed(scene.run, origins, rays, repeats=2))
        hits = scene.run(origins, rays).reshape(camera.size)
        equal.append((hits == cpu.render(mesh, camera).face_id).mean())
    result["memory_mb"]["embree"] = round(memory_mb("VmHWM") - before, 1)
    return {
        "build": pair(np.mean(builds, 0)),
        "render": pair(np.mean(draws, 0)),
        "total": pair(np.mean(builds, 0) + np.mean(draws, 0)),
        "equal_face_ids": float(np.mean(equal)),
    }


def markdown(report: dict) -> str:
    """Return the figures as a page."""
    angles = ", ".join(map(str, ANGLES_DEG))
    about = (
        f"{report['date']}, {report['machine']}; load {report['load']:.1f} at the start, {report['load_end']:.1f} at "
        f"the end. Mean over 3 scenes and orbits of {angles}°, least of 3 calls. Embree: the tree and one ray a pixel, "
        "no shading, 3 frames. Reference: one frame. Memory: our buffers, mesh and pictures; of Embree the growth of "
        "the process. Closed: curtains without end, back faces culled."
    )
    lines = [
        "# Rendering a DW-Mesh",
        "",
        textwrap.fill(about, 120, break_on_hyphens=False),
        "",
        "| size | what | CPU ms | wall ms | target | memory MB | same face ids |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in report["results"]:
        size = f"{r['size'][0]} × {r['size'][1]}"
        first = r["size"] == list(SIZES[0])
        rows = [("mesh + flags", r["build"], "", "", ""), ("render", r["render"], "", "", "")]
        rows += [("render, closed", r["closed"], "", "", "")]
        target = f"≤ {TARGET_MS:g} ms" if first else ""
        rows += [("mesh + flags + render", r["total"], target, r["memory_mb"]["cpu"], "")]
        rows += [(f"a frame, {t} thread{'s' * (t > 1)}", r[f"threads_{t}"], "", "", "") for t in (1, 2)]
        if r["embree"]:
            shares = f"{100 * r['embree']['equal_face_ids']:.2f} %"
            ratio = r["embree"]["total"]["cpu_ms"] / r["total"]["cpu_ms"]
            ratio_text = f"{ratio:.0f} × as long" + (f" (≥ {TARGET_RATIO:g})" if first else "")
            rows += [("Embree, tree", r["embree"]["build"], "", "", "")]
            rows += [("Embree, rays", r["embree"]["render"], "", "", "")]
            rows += [("Embree, both", r["embree"]["total"], ratio_text, r["memory_mb"]["embree"], shares)]
        shares = f"{100 * r['reference']['equal_face_ids']:.2f} %"
        rows.append(("reference, render", r["reference"], "", "", shares))
        lines += [
            f"| {size} | {n} | {v['cpu_ms']:.1f} | {v['wall_ms']:.1f} | {g} | {m} | {e} |" for n, v, g, m, e in rows
        ]
    return "\n".join(lines) + "\n"


def machine() -> str:
    """Return the processor's name, its number of cores, and Python's version."""
    info = Path("/proc/cpuinfo")
    names = (
        [x.split(":")[1].strip() for x in info.read_text().splitlines() if "model name" in x] if info.exists() else []
    )
    return f"{(names or [platform.machine()])[0]}, {os.cpu_count()} cores, Python {platform.python_version()}"


def main() -> None:
    """Measure and write the two files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    small = cases((64, 64))[0]
    cpu.render(build(small[0], small[1], small[2].K), small[2])  # compiled once, outside every figure
    report: dict = {"date": datetime.now(UTC).date().isoformat(), "machine": machine(), "load": os.getloadavg()[0]}
    report["results"] = [measure(size) for size in SIZES]
    report["load_end"] = os.getloadavg()[0]
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "render.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    text = markdown(report)
    (args.output / "render.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
