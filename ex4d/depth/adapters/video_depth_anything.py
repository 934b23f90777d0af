"""Video Depth Anything, its repository on the path of the environment: disparity. Small is Apache-2.0."""

SIZES = {
    "vits": {"encoder": "vits", "features": 64, "out_channels": [48, 96, 192, 384]},
    "vitl": {"encoder": "vitl", "features": 256, "out_channels": [256, 512, 1024, 1024]},
}


def load(options):
    """Return (network, device); `weights` is the file video_depth_anything_vits.pth or …_vitl.pth."""
    import torch
    from video_depth_anything.video_depth import VideoDepthAnything

    device = options["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    if not options["weights"]:
        raise ValueError("set depth_path to the file video_depth_anything_vits.pth")
    network = VideoDepthAnything(**SIZES["vitl" if "vitl" in options["weights"] else "vits"])
    network.load_state_dict(torch.load(options["weights"], map_location="cpu", weights_only=True))
    return network.to(device).eval(), device


def estimate(model, frames):
    """Return disparity at the frames' size."""
    network, device = model
    depths, _ = network.infer_video_depth(frames, 24, input_size=518, device=device, fp32=device == "cpu")
    return {"values": depths, "kind": "disparity"}
