"""Shards on real servers, nginx's https and moto's s3: the same images as from local tars, and every fault told.

They listen on 127.0.0.1 and run where they are installed (`apt-get install nginx openssl`, `pip install
'moto[server]' s3fs`, which the pipeline does not need).
"""

import hashlib
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from shrunk import ROOT
from test_remote import epoch, indexed, local  # noqa: F401  (a fixture)

from pipeline.data.shards import Shards

pytestmark = pytest.mark.exhaustive
READ = """
import hashlib, os, sys
from pathlib import Path
from pipeline.core.stages import UserError
from pipeline.data import remote
from pipeline.data.shards import Shards
remote.WAIT, remote.PATIENCE = 0.0, float(os.environ["PATIENCE"])
shards = Shards(Path("data/images"))
try:
    samples = [shards.read(*shards.place(7, number)) for number in range(len(shards))]
except UserError as error:
    sys.exit(f"error: {error}")
for sample in samples:
    print(sample.tar, hashlib.sha256(sample.image.tobytes()).hexdigest(), sample.caption)
"""


@dataclass
class Store:
    """A server that holds the shards. put: replaces or removes one. environment: of the process that reads there."""

    at: str
    put: Callable[[str, bytes | None], None]
    process: subprocess.Popen[bytes]
    environment: dict[str, str]

    def reading(self, patience: float = 60.0) -> subprocess.Popen[str]:
        """Start a process that reads all images. patience: its limit of a silent server, in seconds."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "no_proxy": "127.0.0.1", "PATIENCE": str(patience)}
        environment |= self.environment
        command = [sys.executable, "-c", READ]
        return subprocess.Popen(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=1
        )


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def served(command: list[str], port: int, environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Start a server, and wait until it listens."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=os.environ | environment, stdout=output, stderr=output, start_new_session=True
        )
    while process.poll() is None:
        with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            return process
        time.sleep(0.05)
    raise AssertionError(log.read_text())


def nginx(local: Path) -> Store:  # noqa: F811
    if not shutil.which("nginx") or not shutil.which("openssl"):
        pytest.skip("there is no nginx or no openssl here (apt-get install nginx openssl)")
    root, port = local.parent / "nginx", free_port()
    root.mkdir()
    own = ["-keyout", root / "key", "-out", root / "certificate", "-subj", "/CN=diva"]
    subject = ["-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", *own, *subject], check=True)
    (root / "nginx.conf").write_text(f"""
        daemon off; master_process off; user root; pid {root}/pid; error_log stderr;
        events {{ }}
        http {{
            access_log off; client_body_temp_path {root}/1; proxy_temp_path {root}/2; fastcgi_temp_path {root}/3;
            uwsgi_temp_path {root}/4; scgi_temp_path {root}/5;
            server {{
                listen 127.0.0.1:{port} ssl; root {local};
                ssl_certificate {root}/certificate; ssl_certificate_key {root}/key;
                location /slow/ {{ alias {local}/; limit_rate 4k; }}
            }}
        }}
    """)
    process = served(["nginx", "-e", "stderr", "-c", f"{root}/nginx.conf"], port, {}, root / "log")

    def put(name: str, content: bytes | None) -> None:
        (local / name).unlink(missing_ok=True)
        if content is not None:
            (local / name).write_bytes(content)

    return Store(f"https://127.0.0.1:{port}", put, process, {"SSL_CERT_FILE": str(root / "certificate")})


def moto(local: Path) -> Store:  # noqa: F811
    if not all(importlib.util.find_spec(name) for name in ("moto", "flask", "s3fs")):
        pytest.skip("there is no moto or no s3fs here (pip install 'moto[server]' s3fs)")
    import boto3

    port = free_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing", "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = served(command, port, environment, local.parent / "log")
    s3 = boto3.client(
        "s3", endpoint_url=environment["AWS_ENDPOINT_URL"], aws_access_key_id="nobody",
        aws_secret_access_key="nothing", region_name="us-east-1",
    )  # fmt: skip
    s3.create_bucket(Bucket="bucket")
    for path in local.glob("*.tar"):
        s3.put_object(Bucket="bucket", Key=f"shards/{path.name}", Body=path.read_bytes())

    def put(name: str, content: bytes | None) -> None:
        if content is None:
            s3.delete_object(Bucket="bucket", Key=f"shards/{name}")
        else:
            s3.put_object(Bucket="bucket", Key=f"shards/{name}", Body=content)

    return Store("s3://bucket/shards", put, process, environment)


@pytest.fixture(params=[nginx, moto], ids=["nginx", "moto"])
def store(local: Path, request: pytest.FixtureRequest) -> Iterator[Store]:  # noqa: F811
    made = request.param(local)
    indexed(local, made.at)
    yield made
    os.killpg(made.process.pid, signal.SIGKILL)
    made.process.wait()


def wanted(local: Path) -> str:  # noqa: F811
    """What is printed of the shards as they lie here."""
    found = epoch(Shards(local))
    return "".join(f"{tar} {hashlib.sha256(image).hexdigest()} {caption}\n" for tar, image, caption in found)


def test_the_same_images_in_the_same_order(store: Store, local: Path) -> None:  # noqa: F811
    read, said = store.reading().communicate()
    assert (read, said) == (wanted(local), "")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: None, "00002.tar does not exist"),
        (lambda content: content[:-1024], "00002.tar could not be fetched in 5 tries (OSError: received "),
        (lambda content: content[:-1] + b"x", "00002.tar could not be fetched in 5 tries (OSError: its sha256 is "),
    ],
    ids=["gone", "cut", "other bytes"],
)
def test_what_is_not_as_the_index_says_is_refused_and_what_is_put_back_is_read(
    store: Store,
    local: Path,  # noqa: F811
    change: Callable[[bytes], bytes | None],
    said: str,
) -> None:
    expected, content = wanted(local), (local / "00002.tar").read_bytes()
    store.put("00002.tar", change(content))
    process = store.reading()
    _, printed = process.communicate()
    assert process.returncode == 1
    assert f"error: {store.at}/{said}" in printed
    assert printed.count("Fetching it again") == (0 if "does not exist" in said else 4)
    store.put("00002.tar", content)
    assert store.reading().communicate() == (expected, "")


def test_a_silent_server_is_asked_five_times_and_its_return_is_noticed(store: Store, local: Path) -> None:  # noqa: F811
    """It is stopped, so its port takes connections that nobody answers."""
    os.killpg(store.process.pid, signal.SIGSTOP)
    process = store.reading(patience=0.5)
    _, printed = process.communicate()
    assert process.returncode == 1
    assert "could not be fetched in 5 tries" in printed
    assert "no shard is skipped" in printed
    assert printed.count("Fetching it again, try 5 of 5") > 0

    process = store.reading(patience=2.0)
    assert process.stderr
    assert "try 2 of 5" in process.stderr.readline()
    os.killpg(store.process.pid, signal.SIGCONT)
    read, _ = process.communicate()
    assert (process.returncode, read) == (0, wanted(local))


@pytest.mark.parametrize("store", [nginx], ids=["nginx"], indirect=True)
def test_a_server_that_is_too_slow_is_asked_five_times(store: Store, local: Path) -> None:  # noqa: F811
    indexed(local, f"{store.at}/slow")
    process = store.reading(patience=2.0)
    _, printed = process.communicate()
    assert process.returncode == 1
    assert re.search(r"could not be fetched in 5 tries \(TimeoutError: received only \d+ of \d+ bytes in \d s", printed)
    assert "Fetching it again, try 5 of 5" in printed


@pytest.mark.parametrize("store", [nginx], ids=["nginx"], indirect=True)
def test_a_full_disk_is_told(store: Store, local: Path) -> None:  # noqa: F811
    cache = Path("data/.shards")
    cache.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", cache]).returncode:
        pytest.skip("mounts are not permitted here")
    try:
        process = store.reading()
        _, said = process.communicate()
    finally:
        subprocess.run(["umount", cache], check=True)
    assert process.returncode == 1
    assert "No space left on device" in said
    assert store.reading().communicate() == (wanted(local), "")
