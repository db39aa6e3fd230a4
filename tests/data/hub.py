"""As much of the Hugging Face Hub as downloads of one data set ask for, on 127.0.0.1."""

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import parse_qs

from data import prepare


class Hub(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.files = files
        self.sent: list[tuple[str, int]] = []  # name and first byte of each file that was asked for
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.status = 200  # other than 200: of all answers
        self.cut_at: dict[str, int] = {}  # name -> the byte before which its connection breaks, for good


class HubHandler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        path, files = self.path.partition("?")[0], self.server.files
        name = path.rpartition("/")[2]
        if self.server.status != 200:
            self.send({}, self.server.status)
        elif "/resolve/" in path and name in files:
            self.send_file(name)
        elif "/tree/" in path:
            self.send([info(name, data) for name, data in files.items()])
        elif "/revision/" in path:
            siblings = [{"rfilename": name} for name in files]
            self.send({"id": prepare.FINEWEB_TOKENS, "sha": "0" * 40, "siblings": siblings})
        else:
            self.send({})

    do_HEAD = do_GET

    def do_POST(self) -> None:  # paths-info
        asked = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())["paths"]
        self.send([info(name, data) for name, data in self.server.files.items() if name in asked], self.server.status)

    def send_file(self, name: str) -> None:
        whole = self.server.files[name]
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        headers = {"ETag": f'"{hashlib.sha256(whole).hexdigest()}"', "X-Repo-Commit": "0" * 40}
        self.send_response(206 if start else 200)
        for header, value in {**headers, "Content-Length": str(len(whole) - start)}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "GET":
            self.server.sent.append((name, start))
            self.wfile.write(whole[start : self.server.cut_at.get(name)])
            self.close_connection = True

    def send(self, content: object, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


def info(name: str, data: bytes) -> dict[str, object]:
    lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return {"type": "file", "path": name, "size": len(data), "oid": "0" * 40, "lfs": lfs}


@contextmanager
def serve(files: dict[str, bytes]) -> Iterator[Hub]:
    with Hub(files) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()
