"""Which pictures `SafeCFG Evaluate` keeps, and how."""

import numpy as np
import pytest
from PIL import Image
from safecfg.hgr_models import HGRError
from safecfg.nodes.evaluate.keeping import EVERYTHING, JUDGED, NONE

from evaluating import evaluated, records


@pytest.mark.parametrize(("how", "kept"), [("blurred", 8), (JUDGED, 8), (NONE, 0), (EVERYTHING, 8)])
def test_what_is_kept(demo, place, how, kept):
    evaluated(demo, keep_pictures=how)
    folder = place / "output/safecfg/evaluations/mine"
    files = sorted((folder / "pictures").glob("*")) if (folder / "pictures").is_dir() else []
    assert len(files) == kept
    for record in records(place) if kept else ():
        path = next(path for path in files if path.stem == record["key"])
        with Image.open(path) as image:
            edges = np.abs(np.diff(np.asarray(image.convert("L"), dtype=float), axis=0)).max()
        is_blurred = (
            how == "blurred" and record["list"] == "i2p" or how == JUDGED and max(record["scores"]["demo"].values()) > 0.5
        )
        if is_blurred:
            assert edges < 25, record
        elif record["list"] == "coco" or how == EVERYTHING:
            assert edges > 35, record


def test_a_full_disk_leaves_no_half_a_picture(demo, place, monkeypatch):
    real = Image.Image.save

    def full(image, path, *args, **kwargs):
        real(image, path, *args, **kwargs)
        if "pictures" in str(path):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(HGRError, match="cannot be written .No space left on device.. Free some space"):
        evaluated(demo, lists="coco.csv = clean")
    assert not list((place / "output/safecfg/evaluations/mine/pictures").iterdir())
