"""A release of files on this machine, over real HTTP: with ranges, redirects, and the ways in which downloads fail."""

import hashlib
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class ReleaseServer:
    """Serves files by their last name, whatever the folder. To be used in a `with` statement.

    Attributes:
        files: {name: content}.
        requests: (path, its Range header or None) of every request so far, in order.
        breaks: after how many bytes each of the next answers with a file ends the connection; None: not at all.
        status: with which every request is answered, where it is not None.
        etags: whether the server names the state of its files, without which no client can resume.
    """

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str | None]] = []
        self.breaks: list[int | None] = []
        self.status: int | None = None
        self.etags = True
        release = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                release.answer(self)

            def log_message(self, *parts):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        """The address of the server."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "ReleaseServer":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()

    def answer(self, handler: BaseHTTPRequestHandler):
        """Answers one request: first with a redirect to where the file is stored, as GitHub does."""
        name, headers = handler.path.rpartition("/")[2], handler.headers
        if not handler.path.startswith("/stored/"):
            self.requests.append((handler.path, headers["Range"]))
            if self.status is None and name in self.files:
                handler.send_response(302)
                handler.send_header("Location", f"/stored/{name}")
            else:
                handler.send_response(self.status or 404)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        content, start = self.files[name], 0
        etag = f'"{hashlib.md5(content).hexdigest()}"'
        asked = re.fullmatch(r"bytes=(\d+)-", headers["Range"] or "")
        if asked and self.etags and headers["If-Range"] in (None, etag):
            start = int(asked[1])
        if start and start >= len(content):
            handler.send_response(416)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if self.etags:
            handler.send_header("ETag", etag)
        handler.send_header("Content-Length", str(len(content) - start))
        handler.end_headers()
        most = self.breaks.pop(0) if self.breaks else None
        handler.wfile.write(content[start:] if most is None else content[start : start + most])
        handler.close_connection = True
