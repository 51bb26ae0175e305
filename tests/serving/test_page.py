"""The page in a real browser: an image put on it shows the server's answer. Skipped, visibly, without a browser.

The picture of docs: VITQ_SCREENSHOT=docs/figures/serve.png pytest tests/serving/test_page.py -k 'page and 800'
"""

import asyncio
import html
import json
import os
import re
import shutil
import subprocess
from base64 import b64encode
from io import BytesIO
from pathlib import Path

import pytest
import torch
from loopback import listening
from PIL import Image
from vitq import Engine, checkpoint, jobs
from vitq.data import digits
from vitq.models import digits_vit
from vitq.recipes import load_recipe
from vitq.sources import ModelSource, load_float

pytest.importorskip("starlette", reason="needs the extra 'serve'")
pytest.importorskip("uvicorn", reason="needs the extra 'serve'")
from vitq.serving import server

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"no browser on the PATH (one of {', '.join(NAMES)})")

# Puts a file on the page as a hand would, waits for what comes of it, and writes down what can be seen.
DROP = """<img src="held" hidden><script>
(async () => {
  const bytes = Uint8Array.from(atob("DATA"), c => c.charCodeAt(0));
  const dropped = new DataTransfer();
  dropped.items.add(new File([bytes], "image.png", {type: "image/png"}));
  const drop = document.getElementById("drop"), answer = document.getElementById("answer");
  const event = new Event("drop", {bubbles: true, cancelable: true});
  event.dataTransfer = dropped;
  const text = id => document.getElementById(id).textContent;
  while (!text("error") && text("about").trim() === "") await new Promise(done => setTimeout(done, 20));
  if (TOKEN) {
    document.getElementById("token").value = TOKEN;
    document.getElementById("access").requestSubmit();
    while (text("about").trim() === "") await new Promise(done => setTimeout(done, 20));
  }
  drop.dispatchEvent(event);
  while (!answer.children.length && !text("error")) await new Promise(done => setTimeout(done, 20));
  const root = document.documentElement, record = document.createElement("pre");
  record.textContent = JSON.stringify({scroll: root.scrollWidth, client: root.clientWidth, name: text("name"),
    about: text("about"), error: text("error"), note: document.getElementById("latency")?.textContent,
    width: document.getElementById("preview").naturalWidth, token: !document.getElementById("access").hidden,
    sides: [...answer.querySelectorAll("section")].map(side => [side.querySelector("h2").textContent,
      [...side.querySelectorAll("tr")].map(row => [...row.cells].map(cell => cell.textContent))])});
  record.hidden = true;
  document.body.append(record);
  await fetch("done", {method: "POST"});
})();
</script>"""


class Held:
    """``app``, and a picture that keeps the page loading, for as long as a browser then waits, until it is done."""

    def __init__(self, app) -> None:
        self.app, self.done = app, asyncio.Event()

    async def __call__(self, scope, receive, send) -> None:
        if scope["path"] == "/done":
            self.done.set()
        elif scope["path"] == "/held":
            await asyncio.wait_for(self.done.wait(), 60)
            self.done.clear()
        else:
            await self.app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})


def shown(client, folder, monkeypatch, body: bytes, width: int = 800, token: str | None = None) -> dict:
    """What the page shows after ``body`` was dropped on it."""
    page = folder / "page.html"
    script = DROP.replace("DATA", b64encode(body).decode()).replace("TOKEN", json.dumps(token))
    page.write_text(original().replace("</html>", script + "</html>"), encoding="utf-8")
    monkeypatch.setattr(server, "PAGE", page)
    monkeypatch.setattr(server, "POLICY", f"{server.POLICY} 'self'")
    flags = ["--headless", "--disable-gpu", "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}"]
    flags += [f"--window-size={width},900"] + ["--no-sandbox"] * (os.geteuid() == 0)
    command = [BROWSER, *flags, "--dump-dom", f"http://127.0.0.1:{client.port}/"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-2000:]
    record = re.search(r'<pre hidden="">(.*?)</pre>', done.stdout, re.S)
    assert record, done.stdout[-2000:] + done.stderr[-2000:]
    if shot := os.environ.get("VITQ_SCREENSHOT"):
        command[command.index("--dump-dom")] = f"--screenshot={Path(shot).resolve()}"
        subprocess.run(command, capture_output=True, timeout=120, check=True)
    said = [line for line in re.findall(r"CONSOLE.*", done.stderr) if "favicon" not in line]
    return json.loads(html.unescape(record[1])) | {"console": said}


def original() -> str:
    return (server.Path(server.__file__).parents[1] / "assets" / "serve.html").read_text(encoding="utf-8")


def png() -> bytes:
    """A handwritten digit."""
    pixels = digits.images("test", torch.tensor([7]))[0][0].permute(1, 2, 0)
    file = BytesIO()
    Image.fromarray((255 * pixels).round().byte().numpy()).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """Of the shipped model, in integers and in float."""
    source = ModelSource(digits_vit.NAME)
    model = load_float(source)
    folder = tmp_path_factory.mktemp("page") / "digits"
    images = jobs.random_images({"float": model}, 8)
    checkpoint.save(folder, jobs.quantize(model, source, load_recipe("vitq-w8a8"), images).state)
    with Engine(folder, buckets=(1,)) as engine, Engine(model, buckets=(1,)) as reference:
        yield engine, reference


@pytest.mark.slow
@pytest.mark.parametrize("width", [500, 800])
def test_an_image_dropped_on_the_page(engines, tmp_path, monkeypatch, width):
    body = png()
    with listening(Held(server.Server(engines[0], "digits", reference=engines[1]))) as client:
        client("POST", "/classify?float=1", body)  # what comes first takes longest
        page = shown(client, tmp_path, monkeypatch, body, width)
        answer = json.loads(client("POST", "/classify?float=1", body)[2])
    assert not page["console"]
    assert not page["error"]
    assert page["scroll"] <= page["client"]
    assert (page["name"], page["width"], page["token"]) == ("digits", 32, False)
    assert "10 classes, 3×32×32" in page["about"]
    assert [side for side, _ in page["sides"]] == ["integer", "float"]
    for side, rows in page["sides"]:
        assert rows == [[row["label"], f"{100 * row['probability']:.1f} %"] for row in answer[side]["top"]]
    assert re.search(r"^[\d.]+ ms from here and back.*; (both say the same|they disagree)$", page["note"])


@pytest.mark.slow
def test_what_is_refused_is_shown(engines, tmp_path, monkeypatch):
    with listening(Held(server.Server(engines[0], "digits", token="0123456789abcdef"))) as client:
        page = shown(client, tmp_path, monkeypatch, b"GIF89a", token="0123456789abcdef")
    assert page["token"], "it is asked for"
    assert page["error"] == "415: the body is no JPEG or PNG image"
    assert page["sides"] == []
    assert not page["console"]
