"""A small server of one file that answers as it is told: with a status, or cut short."""

import contextlib
import http.server
import threading


@contextlib.contextmanager
def serving(body, answers, more=None):
    """The address of the file. answers: what becomes of the next requests for it, taken from the front: a status,
    "cut", or a status and the first byte of the file that it is given for; then all goes well. more: {path: (status,
    headers, body)} of other pages."""
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *said):
            pass

        def do_HEAD(self):
            self.do_GET(head=True)

        def do_GET(self, head=False):
            seen.append((self.path, self.headers.get("Range")))
            if self.path in (more or {}):
                return self._answer(*more[self.path], head)
            how = None if head else next(iter(answers), None)
            if isinstance(how, tuple):
                first = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
                how = how[0] if first >= how[1] else None
            if how is not None:
                answers.pop(0)
            if isinstance(how, int):
                return self._answer(how, {"Retry-After": "0.3"}, b"", head)
            data, status, headers = body, 200, {"Accept-Ranges": "bytes"}
            if asked := self.headers.get("Range"):
                first, _, last = asked.removeprefix("bytes=").partition("-")
                data, status = body[int(first):int(last) + 1 if last else None], 206
                headers["Content-Range"] = f"bytes {first}-{int(first) + len(data) - 1}/{len(body)}"
            self._answer(status, headers, data, head, how == "cut")

        def _answer(self, status, headers, data, head, cut=False):
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if not head:
                with contextlib.suppress(OSError):
                    self.wfile.write(data[:len(data) // 2] if cut else data)
            self.close_connection = self.close_connection or cut

    class Quiet(http.server.ThreadingHTTPServer):
        def handle_error(self, request, address):
            pass        # a client that hangs up

    server = Quiet(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/rows.jsonl", seen
    finally:
        server.shutdown()
        server.server_close()
