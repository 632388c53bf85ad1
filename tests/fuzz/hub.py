"""What the hub's answers have in common: the head of one that sends a file, or the rest of it."""

import hashlib
from http.server import BaseHTTPRequestHandler


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def begins(self, data: bytes, start: int) -> None:
        """Answer that the bytes from `start` on follow."""
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
