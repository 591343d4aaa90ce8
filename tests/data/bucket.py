"""A stand-in for Google Cloud Storage: one dict of objects, seen through fsspec (manifest) and HTTP (ArrayRecord)."""

import http.server
import re
import urllib.parse

from fsspec.implementations.memory import MemoryFileSystem


class Bucket(MemoryFileSystem):
    """What `gcsfs` would be, for paths gs://BUCKET/NAME."""

    protocol = ("gcs", "gs")
    store = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(re.sub(r"^(gs|gcs)://", "/", str(path)))


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """Clients hang up when they have what they want."""


class Handler(http.server.BaseHTTPRequestHandler):
    """Reads objects: GET /storage/v1/b/BUCKET/o/NAME?alt=media, with a range of bytes up to the end of the object."""

    def do_GET(self):
        bucket, name = re.fullmatch(r"/storage/v1/b/([^/]+)/o/([^?]+)\?alt=media.*", self.path).groups()
        found = Bucket.store.get(f"/{bucket}/{urllib.parse.unquote(name)}")
        content = found.getvalue() if found else b""
        wanted = re.fullmatch(r"bytes=(-?\d+)-?", self.headers.get("Range", "bytes=0"))
        first = int(wanted[1])
        if first < 0:  # the last so many
            first = max(0, len(content) + first)
        self.send_response(206 if found else 404)
        if found:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - first))
        self.end_headers()
        self.wfile.write(content[first:])

    def log_message(self, *args):
        """Says nothing."""
