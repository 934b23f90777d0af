"""Tone-map HDR (PQ or HLG, BT.2020) to SDR (BT.709) by the EETF of ITU-R BT.2390-11, section 5.4.1.

The brightest channel of a pixel is mapped from a peak of 1000 cd/m² to the 203 cd/m² that BT.2408 assigns to diffuse
white, on PQ's scale. Up to about 87 cd/m² nothing changes; above, a Hermite spline rolls off. All three channels are
scaled by the same factor, which preserves hue. PQ and HLG follow BT.2100, the display's curve follows BT.1886.
"""

from __future__ import annotations

from functools import cache

import numpy as np

PQ, HLG = 16, 18  # AVColorTransferCharacteristic of H.273
NAMES = {PQ: "pq", HLG: "hlg"}
PEAK, WHITE = 1000.0, 203.0  # cd/m²: peak of the source, brighter is clipped; peak of the SDR display
TO_709 = np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32)
LUMA_2020 = np.array([0.2627, 0.6780, 0.0593], np.float32)
HLG_GAMMA = 1.2  # system gamma at a peak of 1000 cd/m²
ROWS = 256  # rows at a time: a 4K frame takes 100 MB in float32

_M1, _M2 = 2610 / 16384, 2523 / 32
_C1, _C2, _C3 = 3424 / 4096, 2413 / 128, 2392 / 128


def to_sdr(codes: np.ndarray, transfer: int) -> np.ndarray:
    """Convert uint16 [H,W,3] RGB of BT.2020, full range, coded as PQ or HLG, to uint8 [H,W,3] RGB of BT.709."""
    picture = np.empty(codes.shape, np.uint8)
    for top in range(0, len(codes), ROWS):
        strip = _light(transfer)[codes[top : top + ROWS]]
        if transfer == HLG:
            luma = strip @ LUMA_2020
            strip *= PEAK * np.power(luma, HLG_GAMMA - 1, where=luma > 0, out=np.zeros_like(luma))[..., None]
        brightest = strip.max(axis=-1)
        scale = np.interp(brightest, *_tone()).astype(np.float32)
        linear = np.clip((strip * scale[..., None]) @ TO_709.T, 0.0, 1.0)
        picture[top : top + ROWS] = np.rint(255 * np.power(linear, 1 / 2.4))
    return picture


def pq_of(light: np.ndarray) -> np.ndarray:
    """Convert light in cd/m² to a PQ code in [0, 1] (BT.2100, inverse EOTF)."""
    power = np.power(np.asarray(light, np.float64) / 10000, _M1)
    return np.power((_C1 + _C2 * power) / (1 + _C3 * power), _M2)


def light_of_pq(code: np.ndarray) -> np.ndarray:
    """Convert a PQ code in [0, 1] to light in cd/m² (BT.2100, EOTF)."""
    power = np.power(np.asarray(code, np.float64), 1 / _M2)
    return 10000 * np.power(np.maximum(power - _C1, 0) / (_C2 - _C3 * power), 1 / _M1)


def light_of_hlg(code: np.ndarray) -> np.ndarray:
    """Convert an HLG code in [0, 1] to scene light in [0, 1] (BT.2100, inverse OETF)."""
    code = np.asarray(code, np.float64)
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(code <= 0.5, code**2 / 3, (np.exp((code - c) / a) + b) / 12)


def eetf(code: np.ndarray) -> np.ndarray:
    """Map PQ codes from a display of PEAK to one of WHITE (BT.2390-11, 5.4.1; black stays black)."""
    peak = float(pq_of(np.array(PEAK)))
    most = float(pq_of(np.array(WHITE))) / peak
    knee = 1.5 * most - 0.5
    share = np.clip(code / peak, 0, 1)
    t = (share - knee) / (1 - knee)
    spline = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (-2 * t**3 + 3 * t**2) * most
    return peak * np.where(share < knee, share, spline)


@cache
def _light(transfer: int) -> np.ndarray:
    """Return float32 [65536]: light of each 16-bit code; display light in cd/m² for PQ, scene light for HLG."""
    codes = np.arange(65536) / 65535
    return (light_of_pq(codes) if transfer == PQ else light_of_hlg(codes)).astype(np.float32)


@cache
def _tone() -> tuple[np.ndarray, np.ndarray]:
    """Return (light in cd/m², factor to SDR light in [0, 1]): the EETF as a table for interpolation."""
    light = light_of_pq(np.linspace(0, 1, 4097))[1:]
    return light, light_of_pq(eetf(pq_of(light))) / WHITE / light
