"""A stand-in for Google Cloud Storage: one dict of objects, seen through fsspec (manifest) and HTTP (ArrayRecord)."""

import contextlib
import hashlib
import http.server
import re
import urllib.parse

import fsspec
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem


class Bucket(MemoryFileSystem):
    """What `gcsfs` would be, for paths gs://BUCKET/NAME."""

    protocol = ("gcs", "gs")
    store = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(re.sub(r"^(gs|gcs)://", "/", str(path)))

    def _open(self, path, mode="rb", **options):
        assert "a" not in mode, "an object cannot be appended to"
        return super()._open(path, mode, **options)


@contextlib.contextmanager
def bucket():
    """In this process, gs:// leads to `Bucket`; it is empty at the end."""
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    backend.fsspec_backend._get_filesystem.cache_clear()
    yield
    Bucket.store.clear()
    backend.fsspec_backend._get_filesystem.cache_clear()


def objects_in(url):
    """Name and sha256 of every object whose name begins so, as `files_in` of a folder."""
    prefix = url.removeprefix("gs:/") + "/"
    return {
        name.removeprefix(prefix): hashlib.sha256(found.getvalue()).hexdigest()
        for name, found in sorted(Bucket.store.items())
        if name.startswith(prefix)
    }


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
