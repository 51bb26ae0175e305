"""Image files: decoded as they are meant, prepared for the checkpoint that answers."""

import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from loopback import SMALL, infer_binary, listening, logits_of, picture, quantized
from PIL import Image
from vitq import Engine, checkpoint
from vitq.data.folder import read_image

pytest.importorskip("starlette", reason="needs the extra 'serve'")
pytest.importorskip("uvicorn", reason="needs the extra 'serve'")
from vitq.serving import images as files
from vitq.serving.server import PAGE, Server

INFER = "/v2/models/tiny/infer"


def test_the_page_asks_what_any_model_answers(tmp_path):
    """Of two classes there are no five likeliest."""
    checkpoint.save(tmp_path / "two", quantized(0, **{**SMALL, "num_classes": 2}))
    (asked,) = re.findall(r"ask\(`(classify.*?)`", PAGE.read_text(encoding="utf-8"))
    with Engine(tmp_path / "two", buckets=(1,)) as engine, listening(Server(engine, "tiny")) as client:
        status, answer = client.json("POST", "/" + re.sub(r"\$\{.*?\}", "0", asked))
        assert (status, answer["error"]) == (415, "the body is no JPEG or PNG image")
        status, _, answer = client("POST", "/" + re.sub(r"\$\{.*?\}", "0", asked), picture())
        assert (status, len(json.loads(answer)["integer"]["top"])) == (200, 2)


@pytest.mark.parametrize("between", [False, True], ids=["before", "between"])
def test_images_are_preprocessed_for_the_checkpoint_that_answers(folders, tmp_path, monkeypatch, between):
    """Swapped before the request; or after its image was preprocessed for the old one."""
    state = quantized(1)
    checkpoint.save(tmp_path / "new", replace(state, data=state.data | {"mean": [0.9] * 3, "std": [0.1] * 3}))
    new = checkpoint.load(tmp_path / "new")
    with Image.open(io.BytesIO(picture())) as image, torch.inference_mode():
        want = new(files.transform(new.vitq_config.data)(image.convert("RGB"))[None])[0]
    with Engine(folders[0], buckets=(1,)) as engine:
        app = Server(engine, "tiny")
        if between:
            pixels, left = app._pixels, [tmp_path / "new"]

            def swapping(*given):
                made = pixels(*given)
                if left:
                    engine.swap(left.pop())
                return made

            monkeypatch.setattr(app, "_pixels", swapping)
        else:
            engine.swap(tmp_path / "new")
        with listening(app) as client:
            found = json.loads(client("POST", "/classify?top=7", picture())[2])["integer"]["top"]
    assert [row["logit"] for row in found] == want.sort(descending=True).values.tolist()


@pytest.mark.parametrize("channels", [1, 4])
def test_models_of_other_channels(channels, tmp_path):
    """Gray ones classify files, in gray; for others there are none, and tensors are what they take."""
    checkpoint.save(tmp_path / "out", quantized(5, **SMALL, in_chans=channels))
    images = torch.randn(2, channels, 16, 16, generator=torch.Generator().manual_seed(1))
    with Engine(tmp_path / "out", buckets=(1, 2), max_queue=8) as engine, listening(Server(engine, "tiny")) as client:
        assert engine.served.data.input_size == (channels, 16, 16)
        status, headers, body = client("POST", INFER, *infer_binary(images))
        assert status == 200
        assert torch.equal(logits_of(headers, body), checkpoint.load(tmp_path / "out")(images))
        status, _, body = client("POST", "/classify", picture())
        if channels == 1:
            assert status == 200
            pixels = files.transform(engine.served.data)(files.decode(bytearray(picture()), 10_000))
            (want,) = checkpoint.load(tmp_path / "out")(pixels[None])
            assert json.loads(body)["integer"]["top"][0]["class"] == want.argmax()
        else:
            assert status == 400
            assert "the model takes images of 4 channels, expected 3, or 1 for gray ones" in json.loads(body)["error"]


def test_an_image_is_not_copied_as_it_is_decoded():
    body = bytearray(picture())
    before = Image.core.get_stats()["new_count"]
    files.decode(body, 10_000)
    assert Image.core.get_stats()["new_count"] == before + 1


def test_a_jpeg_is_turned_upright():
    upright, exif, file = Image.open(io.BytesIO(picture("JPEG"))), Image.Exif(), io.BytesIO()
    exif[0x0112] = 3  # upside down: blocks of pixels then lie as before
    upright.transpose(Image.Transpose.ROTATE_180).save(file, "JPEG", exif=exif, quality=100, subsampling=0)
    found = files.decode(bytearray(file.getvalue()), 10_000)
    assert np.abs(np.asarray(found, dtype=int) - np.asarray(upright)).max() < 8


def test_gray_of_16_bits_is_not_white():
    gray, file = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256), io.BytesIO()
    Image.fromarray(gray).save(file, "PNG")
    found = np.asarray(files.decode(bytearray(file.getvalue()), gray.size))
    assert np.array_equal(found, np.repeat((gray >> 8)[..., None], 3, 2))
    file.seek(0)
    assert np.array_equal(np.asarray(read_image(file)), found)
