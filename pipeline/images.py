"""Stage `images`: the pictures to post-train on, as shards.

The mini profile's are rendered while img2dataset asks a server on this machine for them: from the list of URLs on, they
go the way that CC3M's go.
"""

import io
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow
import pyarrow.parquet
from PIL import Image

from pipeline import params
from pipeline.adapters import shards
from pipeline.mini import world
from pipeline.runtime import stage, whole, write_json

SET = "post-training"
DETAIL_PROBABILITY = 0.05  # how often a caption names more than its object; web captions seldom speak of details


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # img2dataset's threads all knock at once; the default queue of 5 makes them wait a second
    count: int


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        index = self.path.removeprefix("/").removesuffix(".png")
        if not index.isdecimal() or int(index) >= self.server.count:
            self.send_error(404)
            return
        buffer = io.BytesIO()
        Image.fromarray(world.picture(SET, int(index))[0]).save(buffer, "PNG", compress_level=1)
        self.send_response(200)
        self.send_header("Content-Type", "image/png")
        self.send_header("Content-Length", str(buffer.tell()))
        self.end_headers()
        self.wfile.write(buffer.getvalue())

    def log_message(self, format: str, *args: object) -> None:
        """Be silent."""


@contextmanager
def serve(count: int) -> Iterator[str]:
    """Serve pictures 0..count-1 of the post-training set as /I.png on a free port; yield the address."""
    os.environ["no_proxy"] = "127.0.0.1"  # a proxy that the user's environment names does not see this machine
    with _Server(("127.0.0.1", 0), _Handler) as server:
        server.count = count
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def caption(index: int) -> str:
    """The caption of a post-training picture: its object, and seldom one of its details."""
    scene = world.draw_scene(world.generator(SET, index))  # as world.picture() draws it
    rng = world.generator(SET, index, 1)
    return world.caption(scene, [int(rng.integers(9))] if rng.random() < DETAIL_PROBABILITY else [])


def write_pairs(path: Path, address: str, count: int) -> None:
    """Write img2dataset's list, `count` rows of `url` and `caption`."""
    rows = {"url": [f"{address}/{i}.png" for i in range(count)], "caption": [caption(i) for i in range(count)]}
    schema = pyarrow.schema([("url", pyarrow.string()), ("caption", pyarrow.string())])
    pyarrow.parquet.write_table(pyarrow.table(rows, schema=schema), path)


@stage
def main() -> None:
    p = params.load()
    profile, images = p.run.profile, p.profile.images
    outputs = Path(f"data/{profile}/images"), Path(f"metrics/{profile}/images.json")
    # The list names a port that differs from run to run, so it stays out of the outputs.
    with whole(*outputs) as (folder, report), tempfile.TemporaryDirectory() as scratch, serve(images.count) as address:
        pairs = Path(scratch) / "pairs.parquet"
        write_pairs(pairs, address, images.count)
        write_json(
            report,
            shards.download(
                pairs,
                folder,
                size=images.size,
                shard_size=images.shard_size,
                min_success=images.min_success,
                processes=images.processes,
                threads=images.threads,
            ),
        )


if __name__ == "__main__":
    main()
