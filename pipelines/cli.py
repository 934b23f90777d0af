"""The `ex4d` command: one table of subcommands. Work is done elsewhere and imported only when it is asked for.

Jobs with an experiment behind them read a YAML file: `ex4d COMMAND CONFIG.yaml [section.key=value …]`.
Commands on one thing take flags. Exit status: 0 done, 1 failed, 2 the choice was invalid.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ex4d.errors import BadSample, ConfigError, ContractError


@dataclass(frozen=True)
class Command:
    """One subcommand: its help line, what adds its arguments, and what runs it (the exit status comes back)."""

    help: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


# ---------------------------------------------------------------- jobs: a YAML file and overrides


def _job_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.yaml", help="one experiment; see configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the file's values")


def _preprocess(args: argparse.Namespace) -> int:
    from ex4d import config
    from pipelines import preprocess

    sections = config.load(args.config, preprocess.SECTIONS, args.overrides, preprocess.OPTIONAL)
    result = preprocess.run(sections["preprocess"], sections["ray"], sections["synthetic"])
    print(result.table())
    return result.exit_code


def _encode(args: argparse.Namespace) -> int:
    os.environ.setdefault("TQDM_DISABLE", "1")  # a bar for each file of a model, in every worker
    from ex4d import config
    from pipelines import encode

    sections = config.load(args.config, encode.SECTIONS, args.overrides)
    result = encode.run(sections["encode"], sections["model"], sections["ray"])
    print(result.table(), encode.throughput(result), sep="\n")
    return result.exit_code


def _plan(args: argparse.Namespace) -> int:
    from ex4d import config
    from pipelines import plan

    made, earlier = plan.main(config.load(args.config, plan.SECTIONS, args.overrides, plan.OPTIONAL))
    print(made.table(), plan.judgement(earlier), sep="\n")
    return 0


def _train(args: argparse.Namespace) -> int:
    from pipelines import train

    return train.main([args.config, *args.overrides])


def _evaluate(args: argparse.Namespace) -> int:
    os.environ.setdefault("TQDM_DISABLE", "1")
    from ex4d import config
    from pipelines import evaluate

    sections = config.load(args.config, evaluate.SECTIONS, args.overrides)
    report = evaluate.run(sections["evaluate"], sections["generate"], sections["synthetic"], sections["ray"])
    print(report.table())
    return report.exit_code


def _sweep(args: argparse.Namespace) -> int:
    from pipelines import sweep

    return sweep.main(args.config, args.overrides)


# ---------------------------------------------------------------- commands on one thing


def _view_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `reconstruct` and `generate` share: how depth is found, and where the camera goes."""
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


def _view(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `reconstruct` that `_view_arguments` read, save the profile."""
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


def _reconstruct_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("video", metavar="VIDEO")
    parser.add_argument("--output", required=True, metavar="DIR")
    parser.add_argument("--size", type=_size, help="HxW (default: the video's own)")
    parser.add_argument("--num-frames", type=int, help="default: all")
    parser.add_argument("--save-mesh", nargs="?", const="ply", choices=("ply", "glb"), help="also a mesh a frame")
    _view_arguments(parser)


def _check_output(folder: Path) -> None:
    """Raise ConfigError unless files can be made in `folder`, which may not be there yet: known before the work."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError("output", str(folder), f"{there} is no folder that can be written to")


def _reconstruct(args: argparse.Namespace) -> int:
    from ex4d import reconstruct_files
    from ex4d.reconstruct import reconstruct

    _check_output(Path(args.output))
    view = reconstruct(
        args.video, num_frames=args.num_frames, size=args.size, profile=args.profile or "default", **_view(args)
    )
    paths = reconstruct_files.write(view, args.output, args.save_mesh)
    print(f"{view.visible[-1].mean():.0%} of the last frame is visible")
    for path in paths:
        if path.parent.name != "mesh":
            print(path)
    return 0


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
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
    _view_arguments(parser)


def _generate(args: argparse.Namespace) -> int:
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
        **_view(args),
    )
    for path in view.write(args.output):
        print(path)
    return 0


def _look_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("thing", metavar="THING", help="a dataset that `ex4d preprocess` wrote, or a video")
    parser.add_argument("--output", required=True, metavar="PAGE.html")
    parser.add_argument("--key", action="append", default=[], help="of a dataset: this sample; may be given again")
    parser.add_argument("--samples", type=int, default=8, help="of a dataset, so many (default: %(default)s)")
    parser.add_argument("--size", type=_size, help="of a video: HxW (default: its own)")
    parser.add_argument("--num-frames", type=int, default=49, help="of a video (default: %(default)s)")
    _view_arguments(parser)


def _look(args: argparse.Namespace) -> int:
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
    from ex4d.reconstruct import reconstruct
    from ex4d.viewer import scene_page

    if Path(args.thing).is_dir():
        raise ConfigError("THING", args.thing, "a finished dataset (it has no dataset.json) or a video")
    view = reconstruct(
        args.thing, num_frames=args.num_frames, size=args.size, profile=args.profile or "default", **_view(args)
    )
    print(scene_page.write(view, args.output, Path(args.thing).name))
    return 0


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER", help="folder written by `ex4d train`, its file, or an ex4d.ckpt")
    parser.add_argument("--style", required=True, choices=("ex4d", "released", "kohya", "comfyui", "diffusers"))
    parser.add_argument("--output", required=True, metavar="F", help="the file to write; for ex4d the folder")
    parser.add_argument("--from", dest="lora", metavar="LORA", help="take the LoRA from this file of another program")


def _export(args: argparse.Namespace) -> int:
    from ex4d.models.export import export

    _check_output(Path(args.output).parent)
    print(export(args.adapter, args.style, args.output, args.lora))
    return 0


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", help="folder written by `ex4d preprocess`")
    parser.add_argument("--quick", action="store_true", help="hashes and counts only, no decoding")


def _verify(args: argparse.Namespace) -> int:
    from ex4d.data.verify import verify

    report = verify(args.dataset, full=not args.quick)
    print(report, file=sys.stdout if report.ok else sys.stderr)
    return 0 if report.ok else 1


def _retry_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", metavar="OUT", help="folder written by `ex4d preprocess`")
    parser.add_argument("--reason", action="append", required=True, help="e.g. decode_timeout; may be given again")
    parser.add_argument("--config", metavar="CONFIG.yaml", help="default: the choices of the last run there")


def _retry(args: argparse.Namespace) -> int:
    from pipelines import retry

    result = retry.retry(args.dataset, args.reason, args.config)
    print(result.table(), retry.summary(result), sep="\n")
    return result.exit_code


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="the same facts as one JSON object")


def _doctor(args: argparse.Namespace) -> int:
    from pipelines import doctor

    return doctor.main(as_json=args.json)


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", default="configs/tiny.yaml", metavar="CONFIG.yaml")
    parser.add_argument("--output", default="out/demo", help="folder of everything it makes (default: %(default)s)")


def _demo(args: argparse.Namespace) -> int:
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars of loading a model of 5 MB; read when tqdm is imported

    from pipelines import demo

    return demo.main(args.config, args.output)


COMMANDS = {
    "demo": Command("the whole way on a synthetic corpus, with a page of results", _demo_arguments, _demo),
    "preprocess": Command("videos to training shards", _job_arguments, _preprocess),
    "plan": Command("what preprocessing will cost, measured on a few videos", _job_arguments, _plan),
    "encode": Command("clips to latents, so that training loads no encoder", _job_arguments, _encode),
    "train": Command("shards to an adapter", _job_arguments, _train),
    "sweep": Command("many short trainings, the best configuration", _job_arguments, _sweep),
    "evaluate": Command("how good an adapter is, by figures and side by side", _job_arguments, _evaluate),
    "reconstruct": Command("what a camera path would see of a video", _reconstruct_arguments, _reconstruct),
    "generate": Command("a video seen from the side", _generate_arguments, _generate),
    "view": Command("a page of a dataset's samples, or of a video's mesh and cameras", _look_arguments, _look),
    "export": Command("an adapter for other programs, and back", _export_arguments, _export),
    "verify": Command("check a dataset to the last byte", _verify_arguments, _verify),
    "retry": Command("try again what preprocess refused for a reason", _retry_arguments, _retry),
    "doctor": Command("what this machine has and what is missing", _doctor_arguments, _doctor),
}


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    top = argparse.ArgumentParser(prog="ex4d", description="EX-4D: from ordinary videos to novel views.")
    top.add_argument("--log-level", default="WARNING", choices=("DEBUG", "INFO", "WARNING", "ERROR"))
    subparsers = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.arguments(subparsers.add_parser(name, help=command.help, description=command.help))
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status: 0 done, 1 failed, 2 the choice was invalid."""
    args = parser().parse_args(argv)
    logging.basicConfig(level=args.log_level, format="%(levelname)s %(name)s: %(message)s")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        return COMMANDS[args.command].run(args)
    except ConfigError as error:
        print(f"ex4d {args.command}: {error}", file=sys.stderr)
        return 2
    except BadSample as error:
        named = [getattr(args, name) for name in ("video", "thing") if name in args]  # reasons themselves name no paths
        print(f"ex4d {args.command}: {': '.join([*named, str(error)])}", file=sys.stderr)
        return 1
    except (ContractError, OSError) as error:  # OSError: a disk that is full, a folder that may not be written to
        logging.getLogger(__name__).debug("where it was raised", exc_info=True)
        print(f"ex4d {args.command}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
