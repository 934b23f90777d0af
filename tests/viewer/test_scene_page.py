"""The page of a mesh: it holds the mesh, and a browser draws the condition from the new camera."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from ex4d import synthetic
from ex4d.geometry import mesh
from ex4d.reconstruct import Reconstruction, reconstruct
from ex4d.viewer import scene_page

WORLD = synthetic.SyntheticConfig(num_videos=1, num_frames=3, size=(64, 96), seed=8, camera_motion="static")


@pytest.fixture(scope="module")
def view(tmp_path_factory) -> Reconstruction:
    clip = synthetic.write_corpus(tmp_path_factory.mktemp("clip"), WORLD)[0]
    return reconstruct(clip, num_frames=3, size=None, angle_deg=40.0)


def picture(url: str) -> np.ndarray:
    data = np.frombuffer(base64.b64decode(url.partition(",")[2]), np.uint8)
    return cv2.imdecode(data, cv2.IMREAD_UNCHANGED)[..., ::-1]


def test_the_pictures_hold_depth_flags_and_colours(view):
    scene = scene_page.scene(view)
    assert scene["shape"] == [3, 64, 96]
    for index, (stored, colours) in enumerate(scene["frames"]):
        made = mesh.build(view.frames[index], view.z_depth[index], view.K)
        found = picture(stored).astype(int)
        disparity = (found[..., 0] * 256 + found[..., 1]) * scene["disparity_max"] / 65535
        assert np.abs(disparity - 1 / made.z_depth).max() <= 0.51 * scene["disparity_max"] / 65535
        np.testing.assert_array_equal(found[:-1, :-1, 2] & 1, made.face_occluded[0])
        np.testing.assert_array_equal(found[:-1, :-1, 2] >> 1, made.face_occluded[1])
        assert np.abs(picture(colours).astype(int) - view.frames[index]).mean() < 4  # JPEG


def test_the_first_view_holds_the_scene_and_its_cameras(view):
    scene = scene_page.scene(view)
    centre, extent = np.array(scene["centre"]), scene["extent"]
    points = mesh.build(view.frames[0], view.z_depth[0], view.K).vertices[: 64 * 96].reshape(64, 96, 3)[1:-1, 1:-1]
    inside = np.linalg.norm(points - centre, axis=-1) <= extent
    assert inside.mean() > 0.8
    assert (np.linalg.norm(np.linalg.inv(view.w2c)[:, :3, 3] - centre, axis=-1) <= extent + 1e-9).all()
    assert extent < 3 * np.linalg.norm(points.reshape(-1, 3).max(0) - points.reshape(-1, 3).min(0))


def test_a_large_clip_is_made_smaller_with_its_cameras(view):
    scene = scene_page.scene(view, max_side_px=48)
    assert scene["shape"] == [3, 32, 48]
    np.testing.assert_allclose(np.array(scene["K"]) * 2, [view.K[0, 0], view.K[1, 1], view.K[0, 2], view.K[1, 2]])


def test_nothing_of_a_title_is_executed(view, tmp_path):
    hostile = replace(view, choices={**view.choices, "trajectory": "</script><b>"})
    text = Path(scene_page.write(hostile, tmp_path / "a.html", "<script>alert(1)</script> __SCENE__")).read_text()
    assert text.count('"disparity_max"') == 1
    assert "<script>alert" not in text
    assert "<b>" not in text
    assert not re.search(r"https?://", text.replace("http://www.w3.org", "")), "nothing is fetched"


READ_BACK = """
<script>
addEventListener("load", async () => {
  while (!pictures.length) await new Promise(done => setTimeout(done, 20));
  playing = false; control("from").value = "path"; control("faces").value = "2";
  Object.assign(canvas.style, {width: W + "px", height: H + "px"});
  const found = [];
  for (frame = 0; frame < T; frame++) {
    draw();
    const pixels = new Uint8Array(4 * W * H);
    gl.readPixels(0, 0, W, H, gl.RGBA, gl.UNSIGNED_BYTE, pixels);
    found.push(btoa(String.fromCharCode(...pixels)));
  }
  document.title = "read:" + JSON.stringify(found);
});
</script>"""


@pytest.mark.parametrize("profile", ["default", "closed", "torn"])
def test_a_browser_draws_the_condition(view, tmp_path, profile):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here")
    from ex4d.geometry.render import warp_video

    cond, visible = warp_video(view.frames, view.z_depth, view.K, view.w2c, profile)
    shown = replace(view, profile=profile, cond_video=cond, visible=visible)
    page = tmp_path / "a.html"
    text = Path(scene_page.write(shown, page, "a")).read_text()
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)  # it would refuse the script below
    text = text.replace("antialias: true", "antialias: false").replace("</html>", READ_BACK + "</html>")
    if profile == "torn":
        text = text.replace('control("faces").value = "2"', 'control("faces").value = "0"')
    page.write_text(text)
    flags = ["--headless", "--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    for budget_ms in (20_000, 60_000, 180_000):  # of the browser's own time; a busy machine may need more
        own = ["--user-data-dir=" + str(tmp_path / f"browser{budget_ms}"), f"--virtual-time-budget={budget_ms}"]
        argv = [browser, *flags, *own, "--dump-dom", page.as_uri()]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=100)
        match = re.search(r"<title>read:(.*?)</title>", done.stdout)
        if match:
            break
    if match is None and 'style="display: grid' in done.stdout:
        pytest.skip("this Chromium has no WebGL 2")
    assert match, done.stderr[-2000:]
    for index, data in enumerate(json.loads(match[1])):
        drawn = np.frombuffer(base64.b64decode(data), np.uint8).reshape(64, 96, 4)[::-1, :, :3]
        background = np.abs(drawn.astype(int) - [14, 20, 26]).max(axis=-1) <= 1
        seen = ~background & (drawn.max(axis=-1) > 0)
        if index == 0:
            continue  # set, not drawn
        assert (seen == visible[index]).mean() > 0.995
        both = seen & visible[index]
        assert np.abs(drawn.astype(int) - cond[index])[both].mean() < 5
