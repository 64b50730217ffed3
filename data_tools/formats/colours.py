"""Colours: a PNG whose colours are numbers -> uint8 [H,W,3]."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from data_tools.encode import MAX_PIXELS
from data_tools.record import BadRecord
from mf_scale.data.decode import UNREADABLE


def read_colours(path: Path) -> np.ndarray:
    """Colours of a PNG, uint8 [H,W,3]; BadRecord where it does not decode, is too large or has no colours."""
    try:
        with Image.open(path, formats=("PNG",)) as png:
            if png.width * png.height > MAX_PIXELS:
                raise BadRecord(f"maps above the limit of {MAX_PIXELS} pixels")
            if png.mode not in ("RGB", "RGBA", "P"):
                raise BadRecord(f"maps of mode {png.mode}, which are not in colours")
            return np.asarray(png.convert("RGB"))
    except UNREADABLE as error:
        raise BadRecord(f"maps that do not decode ({type(error).__name__})") from error
