"""Commands on one thing: their flags, and the call that does the work, imported only when it is asked for."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from ex4d.errors import ConfigError

MAX_VIEW_FRAMES = 49  # of a page in three dimensions: some 10 MB


def _path_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `reconstruct`, `generate` and `view` share: how depth is found, and where the camera goes."""
    parser.add_argument("--depth", default="sidecar", help="estimator: sidecar, parallax, … (default: %(default)s)")
    parser.add_argument("--depth-path", help="depth file where it is not beside the video; for a network its weights")
    parser.add_argument("--trajectory", default="orbit", help="a path's name or a file of poses (default: %(default)s)")
    parser.add_argument("--angle-deg", type=float, default=60.0, help="how far the camera goes (default: %(default)s)")
    parser.add_argument(
        *("--trajectory-option", "-t"),
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="distance= of a dolly, turns= of a spiral, zoom= of a zoom; scale=, resample=true, camera= of a file",
    )
    parser.add_argument("--source-poses", metavar="FILE", help="poses of the source camera, where it moves")
    parser.add_argument("--source-scale", type=float, default=1.0, help="depth's units for one of --source-poses")
    parser.add_argument("--fov-deg", type=float, default=54.0, help="where depth brings no intrinsics (default: 54)")
    parser.add_argument("--profile", help="of the mesh: default, closed, torn, or released for published weights")
    parser.add_argument("--backend", default="auto", choices=("auto", "cpu", "reference", "nvdiffrast"))
    parser.add_argument("--seed", type=int, default=0)


def _path(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `reconstruct` that `_path_arguments` read, save the profile."""
    return {
        "trajectory_name": args.trajectory,
        "angle_deg": args.angle_deg,
        "trajectory_options": dict(_option(text) for text in args.trajectory_option),
        "source_poses": args.source_poses,
        "source_scale": args.source_scale,
        "depth": args.depth,
        "depth_path": args.depth_path,
        "fov_deg": args.fov_deg,
        "backend": args.backend,
        "seed": args.seed,
    }


def _option(text: str) -> tuple[str, float | bool | str]:
    """Return (key, value) of KEY=VALUE: a number, true or false, or the text as it stands."""
    key, equals, value = text.partition("=")
    if not key or not equals or not value:
        raise ConfigError("trajectory-option", text, "KEY=VALUE, e.g. zoom=3")
    if value.lower() in ("true", "false"):
        return key, value.lower() == "true"
    try:
        return key, float(value)
    except ValueError:
        return key, value


def _size(text: str) -> tuple[int, int]:
    height, x, width = text.lower().partition("x")
    if not x or not height.isdecimal() or not width.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: write HEIGHTxWIDTH, e.g. 512x512")
    return int(height), int(width)


def reconstruct_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `ex4d reconstruct`."""
    parser.add_argument("video", metavar="VIDEO")
    parser.add_argument("--output", required=True, metavar="DIR")
    parser.add_argument("--size", type=_size, help="HxW (default: the video's own)")
    parser.add_argument("--num-frames", type=int, help="default: all")
    parser.add_argument("--save-mesh", nargs="?", const="ply", choices=("ply", "glb"), help="also a mesh a frame")
    _path_arguments(parser)


def _check_output(folder: Path) -> None:
    """Raise ConfigError unless files can be made in `folder`, which may not be there yet: known before the work."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError("output", str(folder), f"{there} is no folder that can be written to")


def run_reconstruct(args: argparse.Namespace) -> int:
    """Do `ex4d reconstruct`; return the exit status."""
    from ex4d import reconstruct_files
    from ex4d.reconstruct import reconstruct

    _check_output(Path(args.output))
    view = reconstruct(
        args.video, num_frames=args.num_frames, size=args.size, profile=args.profile or "default", **_path(args)
    )
    paths = reconstruct_files.write(view, args.output, args.save_mesh)
    print(f"{view.visible[-1].mean():.0%} of the last frame is visible")
    for path in paths:
        if path.parent.name != "mesh":
            print(path)
    return 0


def generate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `ex4d generate`."""
    parser.add_argument("--video", required=True)
    parser.add_argument("--adapter", required=True, help="folder written by `ex4d train` (its adapter/)")
    parser.add_argument("--output", required=True, metavar="OUT.mp4")
    parser.add_argument("--base", help="base model: tiny, a folder, or a hub id (default: the adapter's own)")
    parser.add_argument("--size", type=_size, help="HxW (default: what the adapter was trained at)")
    parser.add_argument("--num-frames", type=int, help="4k+1 (default: what the adapter was trained at)")
    parser.add_argument("--num-inference-steps", type=int, default=25)
    parser.add_argument("--guidance-scale", type=float, default=5.0, help="1 is off: half the time (default: 5)")
    parser.add_argument("--shift", type=float, help="of the sigma schedule (default: the adapter's own)")
    parser.add_argument("--erosion-px", type=int, default=5, help="the mask shrinks by so much at 512 px (default: 5)")
    parser.add_argument("--prompt", default="")
    parser.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
    parser.add_argument("--quantize", choices=("int8", "fp8", "nf4"), help="the base's blocks, for a small GPU")
    parser.add_argument("--block-swap", type=int, default=0, metavar="N", help="so many blocks wait in host memory")
    parser.add_argument("--offload", action="store_true", help="on the GPU only what works: base, encoder or VAE")
    _path_arguments(parser)


def run_generate(args: argparse.Namespace) -> int:
    """Do `ex4d generate`; return the exit status."""
    from ex4d import generate

    output = Path(args.output)
    if output.suffix.lower() != ".mp4" or output.is_dir():
        raise ConfigError("output", args.output, "the name of an .mp4 file")
    if output.exists() and Path(args.video).exists() and output.samefile(args.video):
        raise ConfigError("output", args.output, "another file than the video, which would be lost")
    _check_output(output.parent)
    sampler = generate.GenerateConfig(
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        shift=args.shift,
        erosion_px=args.erosion_px,
        prompt=args.prompt,
        quantize=args.quantize,
        block_swap=args.block_swap,
        offload=args.offload,
    )
    view = generate.novel_view(
        video_path=args.video,
        adapter_path=args.adapter,
        base=args.base,
        size=args.size,
        num_frames=args.num_frames,
        profile=args.profile,
        config=sampler,
        device=args.device,
        **_path(args),
    )
    for path in view.write(args.output):
        print(path)
    return 0


def view_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `ex4d view`."""
    parser.add_argument("thing", metavar="THING", help="a dataset that `ex4d preprocess` wrote, or a video")
    parser.add_argument("--output", required=True, metavar="PAGE.html")
    parser.add_argument("--key", action="append", default=[], help="of a dataset: this sample; may be given again")
    parser.add_argument("--samples", type=int, default=8, help="of a dataset, so many (default: %(default)s)")
    parser.add_argument("--size", type=_size, help="of a video: HxW (default: its own)")
    parser.add_argument("--num-frames", type=int, help=f"of a video (default: all, {MAX_VIEW_FRAMES} at most)")
    _path_arguments(parser)


def run_view(args: argparse.Namespace) -> int:
    """Do `ex4d view`; return the exit status."""
    from ex4d import storage

    if Path(args.output).suffix.lower() != ".html":
        raise ConfigError("output", args.output, "the name of an .html file")
    _check_output(Path(args.output).parent)
    if storage.exists(storage.join(args.thing, "dataset.json")):
        from ex4d.viewer import page, sample_page

        if args.samples < 1:
            raise ConfigError("samples", args.samples, "at least 1")
        print(page.write(sample_page.samples_page(args.thing, args.key, args.samples), args.output))
        return 0
    from ex4d import video
    from ex4d.reconstruct import reconstruct
    from ex4d.viewer import scene_page

    if Path(args.thing).is_dir():
        raise ConfigError("THING", args.thing, "a finished dataset (it has no dataset.json) or a video")
    count = args.num_frames
    if count is None:
        count = min(MAX_VIEW_FRAMES, len(video.frame_pts(args.thing)[0]))
    view = reconstruct(args.thing, num_frames=count, size=args.size, profile=args.profile or "default", **_path(args))
    title = os.fsencode(Path(args.thing).name).decode("utf-8", "backslashreplace")
    print(scene_page.write(view, args.output, title))
    return 0


def export_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `ex4d export`."""
    parser.add_argument("adapter", metavar="ADAPTER", help="folder written by `ex4d train`, its file, or an ex4d.ckpt")
    parser.add_argument("--style", required=True, choices=("ex4d", "released", "kohya", "comfyui", "diffusers"))
    parser.add_argument("--output", required=True, metavar="F", help="the file to write; for ex4d the folder")
    parser.add_argument("--from", dest="lora", metavar="LORA", help="take the LoRA from this file of another program")


def run_export(args: argparse.Namespace) -> int:
    """Do `ex4d export`; return the exit status."""
    from ex4d.models.export import export

    _check_output(Path(args.output).parent)
    print(export(args.adapter, args.style, args.output, args.lora))
    return 0


def verify_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `ex4d verify`."""
    parser.add_argument("dataset", help="folder written by `ex4d preprocess`")
    parser.add_argument("--quick", action="store_true", help="hashes and counts only, no decoding")


def run_verify(args: argparse.Namespace) -> int:
    """Do `ex4d verify`; return the exit status."""
    from ex4d.data.verify import verify

    report = verify(args.dataset, full=not args.quick)
    print(report, file=sys.stdout if report.ok else sys.stderr)
    return 0 if report.ok else 1


def retry_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `ex4d retry`."""
    parser.add_argument("dataset", metavar="OUT", help="folder written by `ex4d preprocess`")
    parser.add_argument("--reason", action="append", required=True, help="e.g. decode_timeout; may be given again")
    parser.add_argument("--config", metavar="CONFIG.yaml", help="default: the choices of the last run there")


def run_retry(args: argparse.Namespace) -> int:
    """Do `ex4d retry`; return the exit status."""
    from pipelines import retry

    result = retry.retry(args.dataset, args.reason, args.config)
    print(result.table(), retry.summary(result), sep="\n")
    return result.exit_code


def doctor_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `ex4d doctor`."""
    parser.add_argument("--json", action="store_true", help="the same facts as one JSON object")


def run_doctor(args: argparse.Namespace) -> int:
    """Do `ex4d doctor`; return the exit status."""
    from pipelines import doctor

    return doctor.main(as_json=args.json)


def demo_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `ex4d demo`."""
    parser.add_argument("--config", default="configs/tiny.yaml", metavar="CONFIG.yaml")
    parser.add_argument("--output", default="out/demo", help="folder of everything it makes (default: %(default)s)")


def run_demo(args: argparse.Namespace) -> int:
    """Do `ex4d demo`; return the exit status."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars of loading a model of 5 MB; read when tqdm is imported

    from pipelines import demo

    return demo.main(args.config, args.output)
