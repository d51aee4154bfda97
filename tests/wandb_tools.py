"""For test_wandb: a reader of wandb's own files, and a server that behaves as well or as badly as asked."""

import gzip
import json
import struct
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

_BLOCK = 32768
_FULL, _LAST = 1, 4


def records(path: Path) -> Iterator[Any]:
    """What a `.wandb` file holds: LevelDB's log format after a header of 7 bytes, each record a protobuf."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    at, parts = 7, b""
    while at + 7 <= len(data):
        if (room := _BLOCK - at % _BLOCK) < 7:
            at += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        if kind == 0:
            break
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (_FULL, _LAST):
            yield Record.FromString(parts)
            parts = b""


def of_kind(path: Path, kind: str) -> list[Any]:
    return [getattr(r, kind) for r in records(path) if r.WhichOneof("record_type") == kind]


def history(path: Path) -> list[dict[str, Any]]:
    """The logged rows by step: {"_step": 2, "loss": 0.5, "samples/path": "media/...", ...}."""
    return [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in row.item}
        for row in of_kind(path, "history")
    ]


def run_config(path: Path) -> dict[str, Any]:
    return {u.key: json.loads(u.value_json) for u in of_kind(path, "run")[0].config.update}


class FakeWandb:
    """A local server. `mood` may change on the way: "fine", "hangs", "fails" (answers 500)."""

    breaks_after = ""  # the operation after which it fails

    def __init__(self, mood: str):
        self.mood = mood
        self.rows: list[dict[str, Any]] = []  # what came in as history
        self.queries: list[tuple[str, dict[str, Any]]] = []  # operation and variables
        self.uploads: dict[str, bytes] = {}
        self._over = threading.Event()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                if fake.mood == "hangs":
                    fake._over.wait()
                answer = b"{}" if fake.mood != "fine" else fake.answer(self.path, body)
                self.send_response(200 if fake.mood == "fine" else 500)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_GET = do_PUT = do_POST

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # clients that lost patience

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def answer(self, path: str, body: bytes) -> bytes:
        if path.endswith("/file_stream"):
            for line in json.loads(body).get("files", {}).get("wandb-history.jsonl", {}).get("content", []):
                self.rows.append(json.loads(line))
        elif path.startswith("/up/"):
            self.uploads[path.removeprefix("/up/")] = body
        elif path.endswith("/graphql"):
            query = json.loads(body)
            variables = query.get("variables") or {}
            self.queries.append((query["query"].split("(")[0].split()[1], variables))
            if self.queries[-1][0] == self.breaks_after:
                self.mood = "fails"
            return json.dumps({"data": self._data(variables)}).encode()
        return b"{}"

    def _data(self, variables: dict[str, Any]) -> dict[str, Any]:
        """The answers to all of wandb's questions at once."""
        name = variables.get("name") or variables.get("run") or "x"
        project = {"id": "p", "name": "cm_train", "entity": {"id": "e", "name": "me"}}
        bucket = {"id": "r", "name": name, "displayName": name, "config": "{}", "historyLineCount": 0}
        given = variables.get("input") or {}
        files = [f["name"] for f in variables.get("artifactFiles") or given.get("artifactFiles") or []]
        manifest = {"artifactManifest": {"id": "m", "file": self._file("wandb_manifest.json")}}
        return {
            "viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}},
            "serverInfo": {"features": [], "latestLocalVersionInfo": None},
            "model": {"bucket": None},
            "project": None,
            "upsertBucket": {"bucket": {**bucket, "sweepName": None, "project": project}, "inserted": True},
            "createRunFiles": {
                "runID": "r",
                "uploadHeaders": [],
                "files": [self._file(n) for n in variables.get("files") or []],
            },
            "createArtifact": {
                "artifact": {"id": "a", "state": "PENDING", "artifactSequence": {"latestArtifact": None}}
            },
            "createArtifactManifest": manifest,
            "updateArtifactManifest": manifest,
            "createArtifactFiles": {"files": {"edges": [{"node": self._file(n)} for n in files]}},
            "commitArtifact": {"artifact": {"id": "a", "digest": "d"}},
        }

    def _file(self, name: str) -> dict[str, Any]:
        url = f"{self.url}/up/{name}"
        node = {"id": name, "name": name, "displayName": name, "uploadUrl": url, "uploadHeaders": []}
        return {**node, "storagePath": name, "uploadMultipartUrls": None, "artifact": {"id": "a"}}

    def close(self) -> None:
        """Go away, with whoever is still waiting."""
        self._over.set()
        self._server.shutdown()
        self._server.server_close()
