"""Answers with the greeting of the database, whose name the environment has."""

import os
import socket
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        with socket.create_connection((os.environ["DATABASE"], 3306), timeout=30) as db:
            greeting = db.recv(256)  # length, sequence, protocol 10, the server's version and a zero byte
        body = b"the database is " + greeting[5:].split(b"\0")[0] + b"\n"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


print("listening on 8080", flush=True)
ThreadingHTTPServer(("", 8080), Handler).serve_forever()
