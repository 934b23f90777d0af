"""`ex4d generate`: a video seen from another camera path."""

from __future__ import annotations

import argparse
from pathlib import Path

from ex4d.errors import ConfigError
from pipelines.commands import flags


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `ex4d generate`."""
    parser.add_argument("--video", required=True)
    parser.add_argument("--adapter", required=True, help="folder written by `ex4d train` (its adapter/)")
    parser.add_argument("--output", required=True, metavar="OUT.mp4")
    parser.add_argument("--base", help="base model: tiny, a folder, or a hub id (default: the adapter's own)")
    parser.add_argument("--size", type=flags.size, help="HxW (default: what the adapter was trained at)")
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
    flags.path_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Do `ex4d generate`; return the exit status."""
    from ex4d import generate

    output = Path(args.output)
    if output.suffix.lower() != ".mp4" or output.is_dir():
        raise ConfigError("output", args.output, "the name of an .mp4 file")
    if output.exists() and Path(args.video).exists() and output.samefile(args.video):
        raise ConfigError("output", args.output, "another file than the video, which would be lost")
    flags.check_output(output.parent)
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
        **flags.path(args),
    )
    for path in view.write(args.output):
        print(path)
    return 0
