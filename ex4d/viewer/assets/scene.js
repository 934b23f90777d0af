"use strict";
const scene = JSON.parse(document.getElementById("scene").textContent);
const [T, H, W] = scene.shape, canvas = document.getElementById("view");
const gl = canvas.getContext("webgl2", {antialias: true, preserveDrawingBuffer: true});
const control = id => document.getElementById(id);
if (!gl) control("failed").style.display = "grid";

// One vertex a corner of a triangle, found by its number alone: the mesh is the depth picture itself.
const MESH_VERTEX = `#version 300 es
precision highp float; precision highp int;
uniform mat4 uView, uProjection; uniform vec4 uK; uniform ivec2 uSize; uniform float uDisparity, uReach;
uniform highp sampler2D uGeometry;
flat out int vOccluded; flat out float vEnd; out float vDepth; out vec2 vPlace;
float depthAt(ivec2 pixel) {
  vec2 stored = texelFetch(uGeometry, pixel, 0).rg * 255.0;
  return 65535.0 / (max(stored.r * 256.0 + stored.g, 1.0) * uDisparity);
}
const ivec2 CORNERS[6] = ivec2[](ivec2(0,0), ivec2(0,1), ivec2(1,0), ivec2(1,0), ivec2(0,1), ivec2(1,1));
void main() {
  int cell = gl_VertexID / 6, corner = gl_VertexID % 6;
  ivec2 block = ivec2(cell % (uSize.x - 1), cell / (uSize.x - 1)), pixel = block + CORNERS[corner];
  float z = depthAt(pixel);
  int first = 3 * (corner / 3); // an occluded face ends a share behind its nearest corner
  vEnd = (1.0 + uReach) * min(depthAt(block + CORNERS[first]), min(depthAt(block + CORNERS[first + 1]), depthAt(block + CORNERS[first + 2])));
  vDepth = z;
  int flags = int(texelFetch(uGeometry, block, 0).b * 255.0 + 0.5);
  vOccluded = (flags >> (corner / 3)) & 1;
  vPlace = (vec2(pixel) + 0.5) / vec2(uSize);
  vec2 ray = (vec2(pixel) + 0.5 - uK.zw) / uK.xy;
  gl_Position = uProjection * uView * vec4(ray * z, z, 1.0);
}`;
const MESH_FRAGMENT = `#version 300 es
precision highp float;
uniform sampler2D uColour; uniform int uFaces; flat in int vOccluded; flat in float vEnd; in float vDepth; in vec2 vPlace;
out vec4 colour;
void main() {
  vec3 own = texture(uColour, vPlace).rgb;
  if (vOccluded == 1 && (uFaces == 0 || vDepth > vEnd)) discard;
  colour = vec4(vOccluded == 0 ? own : uFaces == 2 ? vec3(0.0) : mix(own, vec3(0.85, 0.25, 0.15), 0.55) * 0.45, 1.0);
}`;
const LINE_VERTEX = `#version 300 es
uniform mat4 uView, uProjection; in vec3 place; void main() { gl_Position = uProjection * uView * vec4(place, 1.0); }`;
const LINE_FRAGMENT = `#version 300 es
precision highp float; uniform vec3 uTint; out vec4 colour; void main() { colour = vec4(uTint, 1.0); }`;

function program(vertex, fragment) {
  const made = gl.createProgram();
  for (const [kind, text] of [[gl.VERTEX_SHADER, vertex], [gl.FRAGMENT_SHADER, fragment]]) {
    const shader = gl.createShader(kind);
    gl.shaderSource(shader, text); gl.compileShader(shader);
    if (!gl.getShaderParameter(shader, gl.COMPILE_STATUS)) throw new Error(gl.getShaderInfoLog(shader));
    gl.attachShader(made, shader);
  }
  gl.linkProgram(made);
  return {made, at: name => gl.getUniformLocation(made, name)};
}

// Matrices are rows of rows, as the files have them; WebGL takes columns.
const times = (a, b) => a.map(row => b[0].map((_, j) => row.reduce((sum, v, k) => sum + v * b[k][j], 0)));
const columns = m => new Float32Array(m[0].flatMap((_, j) => m.map(row => row[j])));
function inverse(m) { // of a rotation and a shift
  const r = [0, 1, 2].map(i => [m[0][i], m[1][i], m[2][i]]);
  return [...r.map(row => [...row, -(row[0] * m[0][3] + row[1] * m[1][3] + row[2] * m[2][3])]), [0, 0, 0, 1]];
}
function projection(K, width, height) { // OpenCV's camera axes to clip space
  const near = scene.radius / 200, far = 8 * scene.farthest, a = (far + near) / (far - near), b = -2 * far * near / (far - near);
  return [[2 * K[0] / width, 0, 2 * K[2] / width - 1, 0], [0, -2 * K[1] / height, 1 - 2 * K[3] / height, 0],
          [0, 0, a, b], [0, 0, 1, 0]];
}
function lookAt(eye, target) {
  const unit = v => { const n = Math.hypot(...v); return v.map(x => x / n); };
  const cross = (a, b) => [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]];
  const z = unit(target.map((v, i) => v - eye[i])), x = unit(cross([0, 1, 0], z)), y = cross(z, x);
  return [...[x, y, z].map(row => [...row, -(row[0] * eye[0] + row[1] * eye[1] + row[2] * eye[2])]), [0, 0, 0, 1]];
}

const mesh = gl && program(MESH_VERTEX, MESH_FRAGMENT), line = gl && program(LINE_VERTEX, LINE_FRAGMENT);
const textures = [0, 1].map(unit => {
  const texture = gl.createTexture();
  gl.activeTexture(gl.TEXTURE0 + unit); gl.bindTexture(gl.TEXTURE_2D, texture);
  for (const [name, value] of [["MIN_FILTER", unit ? gl.LINEAR : gl.NEAREST], ["MAG_FILTER", unit ? gl.LINEAR : gl.NEAREST],
    ["WRAP_S", gl.CLAMP_TO_EDGE], ["WRAP_T", gl.CLAMP_TO_EDGE]]) gl.texParameteri(gl.TEXTURE_2D, gl["TEXTURE_" + name], value);
  return texture;
});
const buffer = gl.createBuffer(), free = {yaw: -0.5, pitch: 0.25, distance: 2.4 * scene.extent};
let pictures = [], shown = -1, frame = 0, playing = true;

function frustum(w2c, K, size) {
  const c2w = inverse(w2c), depth = size * scene.radius;
  const at = p => c2w.slice(0, 3).map(row => row[0] * p[0] + row[1] * p[1] + row[2] * p[2] + row[3]);
  const corner = (u, v) => at([(u - K[2]) / K[0] * depth, (v - K[3]) / K[1] * depth, depth]);
  const eye = at([0, 0, 0]), c = [corner(0, 0), corner(W, 0), corner(W, H), corner(0, H)];
  return [...c.flatMap(p => [eye, p]), c[0], c[1], c[1], c[2], c[2], c[3], c[3], c[0]].flat();
}
const pathLine = () => scene.w2c.map(m => inverse(m).slice(0, 3).map(row => row[3]))
  .flatMap((p, i, all) => i ? [...all[i - 1], ...p] : []);

function draw() {
  const width = canvas.width = canvas.clientWidth * devicePixelRatio, height = canvas.height = canvas.clientHeight * devicePixelRatio;
  gl.viewport(0, 0, width, height);
  gl.clearColor(0.055, 0.078, 0.102, 1); gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT); gl.enable(gl.DEPTH_TEST);
  const from = control("from").value;
  let view, K;
  if (from === "free") {
    const target = scene.centre, d = free.distance, c = Math.cos(free.pitch);
    view = lookAt([target[0] + d * c * Math.sin(free.yaw), target[1] - d * Math.sin(free.pitch), target[2] - d * c * Math.cos(free.yaw)], target);
    const focal = 1.5 * Math.min(width, height); K = [focal, focal, width / 2, height / 2];
  } else {
    view = from === "path" ? scene.w2c[frame] : scene.source_w2c[frame];
    const own = from === "path" ? scene.view_K[frame] : scene.K, scale = Math.min(width / W, height / H);
    K = [own[0] * scale, own[1] * scale, (width - W * scale) / 2 + own[2] * scale, (height - H * scale) / 2 + own[3] * scale];
  }
  const clip = columns(projection(K, width, height));
  if (shown !== frame) {
    pictures[frame].forEach((picture, unit) => {
      gl.activeTexture(gl.TEXTURE0 + unit); gl.bindTexture(gl.TEXTURE_2D, textures[unit]);
      gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA, gl.RGBA, gl.UNSIGNED_BYTE, picture);
    });
    shown = frame;
  }
  // Where curtains end one may look into the volume, and no face is drawn from behind: as the renderers have it.
  gl[from !== "free" && scene.curtain_reach < 1e6 ? "enable" : "disable"](gl.CULL_FACE);
  gl.useProgram(mesh.made);
  gl.uniformMatrix4fv(mesh.at("uView"), false, columns(times(view, inverse(scene.source_w2c[frame]))));
  gl.uniformMatrix4fv(mesh.at("uProjection"), false, clip);
  gl.uniform4fv(mesh.at("uK"), scene.K); gl.uniform2i(mesh.at("uSize"), W, H);
  gl.uniform1f(mesh.at("uDisparity"), scene.disparity_max); gl.uniform1f(mesh.at("uReach"), scene.curtain_reach);
  gl.uniform1i(mesh.at("uGeometry"), 0); gl.uniform1i(mesh.at("uColour"), 1);
  gl.uniform1i(mesh.at("uFaces"), Number(control("faces").value));
  gl.disableVertexAttribArray(0);
  gl.drawArrays(gl.TRIANGLES, 0, 6 * (W - 1) * (H - 1));
  if (control("cameras").checked && from === "free") {
    gl.useProgram(line.made);
    gl.uniformMatrix4fv(line.at("uView"), false, columns(view)); gl.uniformMatrix4fv(line.at("uProjection"), false, clip);
    const step = Math.max(1, Math.round(T / 8)), others = scene.w2c.filter((_, i) => i % step === 0);
    for (const [tint, points] of [[[0.45, 0.55, 0.65], [...pathLine(), ...others.flatMap((m, i) => frustum(m, scene.view_K[i * step], 0.12))]],
      [[1, 1, 1], frustum(scene.source_w2c[frame], scene.K, 0.25)], [[1, 0.65, 0.15], frustum(scene.w2c[frame], scene.view_K[frame], 0.25)]]) {
      gl.bindBuffer(gl.ARRAY_BUFFER, buffer); gl.bufferData(gl.ARRAY_BUFFER, new Float32Array(points), gl.DYNAMIC_DRAW);
      const place = gl.getAttribLocation(line.made, "place");
      gl.enableVertexAttribArray(place); gl.vertexAttribPointer(place, 3, gl.FLOAT, false, 0, 0);
      gl.uniform3fv(line.at("uTint"), tint); gl.drawArrays(gl.LINES, 0, points.length / 3);
      gl.disableVertexAttribArray(place);
    }
  }
  control("told").textContent = `frame ${frame + 1} of ${T} · ${Math.round(100 * scene.visible[frame])} % seen by the new camera`;
  control("time").value = frame;
}

async function start() {
  control("time").max = T - 1;
  const bitmap = async data => createImageBitmap(await (await fetch(data)).blob(), {colorSpaceConversion: "none", premultiplyAlpha: "none"});
  pictures = await Promise.all(scene.frames.map(pair => Promise.all(pair.map(bitmap))));
  const asked = new URLSearchParams(location.hash.slice(1)); // #frame=8&from=path&faces=2: a link to what is looked at
  for (const name of ["from", "faces"]) if (asked.has(name)) control(name).value = asked.get(name);
  if (asked.has("frame")) { frame = Math.min(T - 1, Number(asked.get("frame"))); playing = false; }
  const label = () => { control("play").textContent = playing ? "pause" : "play"; };
  label(); draw();
  setInterval(() => { if (playing) { frame = (frame + 1) % T; draw(); } }, 1000 / scene.fps);
  control("play").onclick = () => { playing = !playing; label(); };
  control("time").oninput = event => { frame = Number(event.target.value); playing = false; label(); draw(); };
  control("controls").onchange = draw; addEventListener("resize", draw);
  let held = null;
  canvas.onpointerdown = event => { held = [event.clientX, event.clientY]; canvas.setPointerCapture(event.pointerId); };
  canvas.onpointerup = canvas.onpointercancel = () => { held = null; };
  canvas.onpointermove = event => {
    if (!held) return;
    free.yaw -= (event.clientX - held[0]) / 200;
    free.pitch = Math.min(1.5, Math.max(-1.5, free.pitch + (event.clientY - held[1]) / 200));
    held = [event.clientX, event.clientY]; control("from").value = "free"; draw();
  };
  canvas.addEventListener("wheel", event => { event.preventDefault(); free.distance *= Math.exp(event.deltaY / 800); draw(); }, {passive: false});
}
if (gl) start();
