"""Serve a model over HTTP with onnxruntime, numpy and Pillow: python examples/serve_with_onnxruntime.py MODEL.onnx

Another program needs only the ONNX file: its metadata holds the labels and the preprocessing. Try the server with
`curl --data-binary @photo.jpg http://127.0.0.1:8000/`.
"""

import io
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

MOST_BYTES = 20_000_000


class Model:
    def __init__(self, path: str):
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        config = json.loads(self.session.get_modelmeta().custom_metadata_map["config.json"])
        self.labels, self.shown = config["label_names"], config["pretrained_cfg"]
        self.temperature = (config["metasaug"].get("calibration") or {"temperature": 1})["temperature"]

    def predict(self, content: bytes) -> dict[str, float]:
        """The five likeliest classes and their probabilities."""
        picture = self.fitted(Image.open(io.BytesIO(content)).convert("RGB"))
        x = (np.asarray(picture) / 255 - self.shown["mean"]) / self.shown["std"]
        pictures = x.transpose(2, 0, 1)[None].astype(np.float32)  # (1, 3, height, width)
        logits = self.session.run(["logits"], {"pictures": pictures})[0][0] / self.temperature
        exponents = np.exp(logits - logits.max())
        probabilities = exponents / exponents.sum()
        return {self.labels[c]: round(float(probabilities[c]), 4) for c in np.argsort(-probabilities)[:5]}

    def fitted(self, picture: Image.Image) -> Image.Image:
        """The picture at the network's size: squashed, on a border, or its shorter side resized; then its middle."""
        _, height, width = self.shown["input_size"]
        how, mode = Image.Resampling[self.shown["interpolation"].upper()], self.shown.get("crop_mode")
        full = int(width / self.shown["crop_pct"]), int(height / self.shown["crop_pct"])
        if mode == "squash":
            picture = picture.resize(full, how)
        elif mode == "border":
            picture = ImageOps.pad(picture, full, how, color=tuple(round(255 * m) for m in self.shown["mean"]))
        else:
            scale = max(full[0] / picture.width, full[1] / picture.height)
            picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), how)
        left, top = (picture.width - width) // 2, (picture.height - height) // 2
        return picture.crop((left, top, left + width, top + height))


def handler(model: Model) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            try:
                if not 0 < length <= MOST_BYTES:
                    raise ValueError(f"send a picture of at most {MOST_BYTES:,} bytes, with its Content-Length")
                status, answer = 200, model.predict(self.rfile.read(length))
            except (OSError, ValueError) as error:  # Pillow raises these for a file that is not a picture
                status, answer = 400, {"error": str(error)}
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler


def main(path: str, port: int = 8000) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", port), handler(Model(path)))
    print(f"http://127.0.0.1:{server.server_address[1]}")
    server.serve_forever()


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:3]))
